"""Weights to sample from: of a run's checkpoint, or of one .safetensors file that carries its model spec."""

import os
import tempfile

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imm_scale import build, storage
from imm_scale.build import ModelSpec
from imm_scale.config import from_yaml
from imm_scale.errors import UserError
from imm_scale.flow_map import FlowMap
from imm_scale.training.checkpoint import Checkpoint
from imm_scale.training.ema import state_name

RAW_WEIGHTS = 0.0
_SPEC_KEY = "imm_scale_spec"


def is_file(source: str) -> bool:
    return source.endswith(".safetensors")


def ema_state(checkpoint: Checkpoint, ema: float | None) -> str:
    """The checkpoint's state for a decay: None the first of its config, 0 the raw weights.

    Raises:
        UserError: an average the checkpoint does not hold.
    """
    if ema == RAW_WEIGHTS:
        return "weight"
    decay = from_yaml(checkpoint.meta.config).ema.decays[0] if ema is None else ema
    if state_name(decay) not in checkpoint.states:
        held = ", ".join(state.removeprefix("ema-") for state in checkpoint.states if state.startswith("ema-"))
        raise UserError(f"{checkpoint.url} holds no moving average of decay {decay:g}; it has {held} (0: raw weights)")
    return state_name(decay)


def read(source: str, ema: float | None = None, step: int | None = None) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Spec and fp32 weights of a run folder (its newest checkpoint, or that of `step`) or of a .safetensors file.

    Raises:
        UserError: nothing there, a file that was not exported by imm-scale, or an average that is not held.
    """
    if is_file(source):
        return _read_file(source)
    checkpoint = Checkpoint.latest(source) if step is None else Checkpoint.of_step(source, step)
    return ModelSpec.from_json(checkpoint.meta.spec), checkpoint.weights(ema_state(checkpoint, ema))


def _read_file(source: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    if not storage.exists(source):
        raise UserError(f"{source} does not exist")
    with tempfile.TemporaryDirectory() as temporary:
        path = storage.local_path(source) if storage.is_local(source) else os.path.join(temporary, "weights")
        if not storage.is_local(source):
            storage.write_bytes(path, storage.read_bytes(source))
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{source} is not a safetensors file: {error}") from error
    if _SPEC_KEY not in metadata:
        raise UserError(f"{source} carries no model spec: write it with `imm-scale export`")
    return ModelSpec.from_json(metadata[_SPEC_KEY]), weights


def load_flow_map(source: str, ema: float | None = None, step: int | None = None) -> tuple[ModelSpec, FlowMap]:
    """A flow map ready to sample: in eval mode, without gradients."""
    spec, weights = read(source, ema, step)
    flow_map = build.flow_map(spec)
    put(flow_map, weights, source)
    return spec, flow_map.eval().requires_grad_(False)


def put(flow_map: FlowMap, weights: dict[str, Tensor], source: str) -> None:
    """Copies weights into the net. Raises UserError where names or shapes do not fit."""
    try:
        flow_map.model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights of {source} do not fit this model: {error}") from error


def export(run_dir: str, out: str, ema: float | None = None, step: int | None = None) -> None:
    """Writes one .safetensors file with the weights and everything needed to sample from them."""
    if not is_file(out):
        raise UserError(f"--out {out}: the name must end in .safetensors")
    spec, weights = read(run_dir, ema, step)
    with tempfile.TemporaryDirectory() as temporary:
        path = os.path.join(temporary, "weights.safetensors")
        save_file({name: value.contiguous() for name, value in weights.items()}, path, {_SPEC_KEY: spec.to_json()})
        with open(path, "rb") as file:
            storage.write_bytes(out, file.read())
