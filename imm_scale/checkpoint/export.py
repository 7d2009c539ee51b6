"""Weights to sample from: of a run's checkpoint, or exported with their model spec.

An export is one .safetensors file with the spec in its header, or a folder as diffusers lays it out: config.json beside
diffusion_pytorch_model.safetensors. A folder with a config.json is an export; a run folder has a config.yaml instead.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imm_scale import build, storage
from imm_scale.build import ModelSpec
from imm_scale.checkpoint import averages
from imm_scale.checkpoint.format import COMMITTED, Checkpoint, committed_steps, use_newest
from imm_scale.config.load import from_yaml
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap

Result = TypeVar("Result")
RAW_WEIGHTS = 0.0
FORMATS = ("safetensors", "diffusers")
_FOREIGN = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_SPEC_KEY = "imm_scale_spec"
_CLASS_NAME = "ImmScaleFlowMap"
_FOLDER_CONFIG = "config.json"
_FOLDER_WEIGHTS = "diffusion_pytorch_model.safetensors"


def is_file(source: str) -> bool:
    """Whether `source` names an exported file, by its ending alone."""
    return source.endswith(".safetensors")


def is_export(source: str) -> bool:
    """Whether `source` is an exported file or folder, rather than a run folder."""
    return is_file(source) or _is_folder(source)


def is_checkpoint(source: str) -> bool:
    """Whether `source` is the folder of one committed checkpoint."""
    return not is_file(source) and storage.exists(storage.join(source, COMMITTED))


def _is_folder(source: str) -> bool:
    return storage.exists(storage.join(source, _FOLDER_CONFIG))


def ema_state(checkpoint: Checkpoint, ema: float | None) -> str:
    """The checkpoint's state for a decay: None the first of its config, 0 the raw weights.

    Raises:
        UserError: an average the checkpoint does not hold.
    """
    config = from_yaml(checkpoint.meta.config)
    if ema == RAW_WEIGHTS:
        return "weight"
    decay = config.ema.decays[0] if ema is None else ema
    state = averages.state_of(checkpoint, decay)
    if state is None:
        held = ", ".join(repr(other) for other in config.ema.decays if averages.state_of(checkpoint, other))
        raise UserError(f"{checkpoint.url} holds no moving average of decay {decay!r}; it has {held} (0: raw weights)")
    return state


def warnings(source: str, ema: float | None = None, step: int | None = None) -> list[str]:
    """What a user of these weights must know, one sentence each: an average that is young. Takes what `read` takes."""
    if is_export(source):
        return []
    warning = _of_checkpoint(source, step, lambda checkpoint: averages.warning(checkpoint, ema))
    return [warning] if warning else []


def _of_checkpoint(source: str, step: int | None, use: Callable[[Checkpoint], Result]) -> Result:
    """What `use` makes of a checkpoint: the one whose folder it is, or a run's, of a step or the newest."""
    if source.endswith(_FOREIGN):
        raise UserError(f"{source} was not written by imm-scale: make a .safetensors of it by `imm-scale import`")
    if is_checkpoint(source):
        return use(Checkpoint(source))
    steps = committed_steps(source)
    if step is not None and steps and step not in steps:
        raise UserError(f"{source} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return use_newest(source, use) if step is None else use(Checkpoint.of_step(source, step))


def read(source: str, ema: float | None = None, step: int | None = None) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Spec and fp32 weights of a run folder (its newest checkpoint, or that of `step`), a checkpoint, or an export.

    Weights are by parameter name, each in its parameter's shape.

    Raises:
        UserError: nothing there, an export that imm-scale did not write, or an average that is not held.
    """
    if is_file(source):
        metadata, weights = read_tensors(source)
        return _spec_of_file(source, metadata), weights
    if _is_folder(source):
        return _spec_of_folder(source), read_tensors(storage.join(source, _FOLDER_WEIGHTS))[1]
    return _of_checkpoint(source, step, lambda checkpoint: _read_checkpoint(checkpoint, ema))


def _read_checkpoint(checkpoint: Checkpoint, ema: float | None) -> tuple[ModelSpec, dict[str, Tensor]]:
    state = ema_state(checkpoint, ema)  # reads the config, whose plugins the spec may need
    return ModelSpec.from_json(checkpoint.meta.spec), checkpoint.weights(state)


def read_spec(source: str, ema: float | None = None, step: int | None = None) -> tuple[ModelSpec, str]:
    """The spec that `read` would give, and what the weights are in words, without reading them.

    Raises:
        UserError: as `read`, where it can be known without the weights.
    """
    if is_file(source):
        return _spec_of_file(source, _header(source)), source
    if _is_folder(source):
        return _spec_of_folder(source), source
    checkpoint = _of_checkpoint(source, step, lambda checkpoint: checkpoint)
    state = ema_state(checkpoint, ema)
    return ModelSpec.from_json(checkpoint.meta.spec), f"{checkpoint.url} ({state})"


def _spec_of_file(source: str, metadata: dict[str, str]) -> ModelSpec:
    if _SPEC_KEY not in metadata:
        raise UserError(
            f"{source} carries no model spec: write it with `imm-scale export`, or where it holds published weights of "
            "DiT or SiT with `imm-scale import`"
        )
    return ModelSpec.from_json(metadata[_SPEC_KEY])


def _header(url: str) -> dict[str, str]:
    """The strings in the header of a .safetensors file: 8 bytes of its length, and JSON."""
    if not storage.exists(url):
        raise UserError(f"{url} does not exist")
    try:
        length = int.from_bytes(storage.read_range(url, 0, 8), "little")
        header = json.loads(storage.read_range(url, 8, min(8 + length, storage.size(url))))
    except (ValueError, OSError) as error:
        raise UserError(f"{url} is not a safetensors file: {error}") from error
    return header.get("__metadata__", {}) if isinstance(header, dict) else {}


def _spec_of_folder(source: str) -> ModelSpec:
    url = storage.join(source, _FOLDER_CONFIG)
    try:
        fields = json.loads(storage.read_bytes(url))
    except ValueError as error:
        raise UserError(f"{url} is not JSON ({error}): write the folder with `imm-scale export`") from error
    if not isinstance(fields, dict) or fields.pop("_class_name", None) != _CLASS_NAME:
        raise UserError(f"{url} describes no model of imm-scale: write it with `imm-scale export --format diffusers`")
    try:
        return ModelSpec.from_json(json.dumps(fields))
    except (KeyError, TypeError) as error:
        raise UserError(f"{url} lacks a field or has one too many ({error}): export the model again") from error


def read_tensors(url: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a .safetensors file. Raises UserError for one that is none."""
    if not storage.exists(url):
        raise UserError(f"{url} does not exist")
    with tempfile.TemporaryDirectory() as temporary:
        path = storage.local_path(url) if storage.is_local(url) else os.path.join(temporary, "weights")
        if not storage.is_local(url):
            storage.write_bytes(path, storage.read_bytes(url))
        try:
            with safe_open(path, framework="pt") as file:
                return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{url} is not a safetensors file: {error}") from error


def load_flow_map(source: str, ema: float | None = None, step: int | None = None) -> tuple[ModelSpec, FlowMap]:
    """A flow map ready to sample: in eval mode, without gradients."""
    spec, weights = read(source, ema, step)
    flow_map = build.net(spec)
    put(flow_map, weights, source)
    return spec, flow_map.eval().requires_grad_(False)


def identity(spec: ModelSpec, flow_map: FlowMap) -> str:
    """sha256 of the spec and of every weight: equal for an export and the run it came from."""
    digest = hashlib.sha256(spec.to_json().encode())
    for name, value in sorted(flow_map.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def put(flow_map: FlowMap, weights: dict[str, Tensor], source: str) -> None:
    """Copies weights into the net. Raises UserError where names or shapes do not fit."""
    try:
        flow_map.model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights of {source} do not fit this model: {error}") from error


def export(
    source: str, out: str, ema: float | None = None, step: int | None = None, format: str = "safetensors"
) -> None:
    """Writes the weights of a run (or of another export) and everything needed to sample from them, as `write` does."""
    check_out(out, format)
    write(*read(source, ema, step), out, format)


def write(spec: ModelSpec, weights: dict[str, Tensor], out: str, format: str = "safetensors") -> None:
    """Writes spec and weights: `safetensors` to one file, `diffusers` to a folder. `read` gives back shapes and bits.

    Raises:
        UserError: an unknown format, or a name that does not fit it.
    """
    check_out(out, format)
    if format == "safetensors":
        _write_tensors(weights, out, {_SPEC_KEY: spec.to_json()})
        return
    config = storage.join(out, _FOLDER_CONFIG)
    storage.remove(config)  # while it is missing, the folder is no export: never a new config beside old weights
    _write_tensors(weights, storage.join(out, _FOLDER_WEIGHTS), {"format": "pt"})
    fields = {"_class_name": _CLASS_NAME, **json.loads(spec.to_json())}
    storage.write_text(config, json.dumps(fields, indent=2) + "\n")


def check_out(out: str, format: str) -> None:
    """Raises UserError for an unknown format, or a name that does not fit it."""
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if format == "safetensors" and not is_file(out):
        raise UserError(f"--out {out}: the name must end in .safetensors, or give --format diffusers for a folder")
    if format == "diffusers" and is_file(out):
        raise UserError(f"--out {out}: --format diffusers writes a folder, give a name without .safetensors")
    if format == "diffusers" and storage.exists(storage.join(out, "config.yaml")):
        raise UserError(f"--out {out} is a run folder: export to another one")


def _write_tensors(weights: dict[str, Tensor], url: str, metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        path = os.path.join(temporary, "weights.safetensors")
        save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata)
        storage.write_file(url, path)
