"""Weights to sample from: of a run's checkpoint, or exported with their model spec.

An export is one .safetensors file with the spec in its header, or a pipeline's folder that diffusers loads
(`pipeline_folder.py`). Version 0.1 wrote folders of a config.json beside diffusion_pytorch_model.safetensors, which are
still read. Either says which average and step it holds; a run folder has a config.yaml instead.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imm_scale import build, storage
from imm_scale.build import ModelSpec
from imm_scale.checkpoint import averages, pipeline_folder
from imm_scale.checkpoint.format import COMMITTED, Checkpoint, committed_steps, use_newest
from imm_scale.checkpoint.origin import Origin
from imm_scale.config.load import from_yaml
from imm_scale.errors import UserError

Result = TypeVar("Result")
RAW_WEIGHTS = 0.0
FORMATS = ("safetensors", "diffusers")
_FOREIGN = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_SPEC_KEY = "imm_scale_spec"
_ORIGIN_KEY = "imm_scale_weights"
# Of folders as version 0.1 wrote them
_CLASS_NAME = "ImmScaleFlowMap"
_FOLDER_CONFIG = "config.json"


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
    return any(storage.exists(storage.join(source, name)) for name in (pipeline_folder.RECORD, _FOLDER_CONFIG))


def ema_state(checkpoint: Checkpoint, ema: float | None) -> str:
    """The checkpoint's state for a decay: None the first of its config, 0 the raw weights.

    Raises:
        UserError: an average the checkpoint does not hold.
    """
    config = from_yaml(checkpoint.meta.config)
    if ema == RAW_WEIGHTS:
        return "weight"
    if ema is None and not config.ema.decays:
        raise UserError(f"{checkpoint.url} has no moving average (ema.decays=[]): take the raw weights, with ema=0")
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
    warning = _use_checkpoint(source, step, lambda checkpoint: averages.warning(checkpoint, ema))
    return [warning] if warning else []


def _use_checkpoint(source: str, step: int | None, use: Callable[[Checkpoint], Result]) -> Result:
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
    return _read(source, ema, step)[:2]


def _read(source: str, ema: float | None, step: int | None) -> tuple[ModelSpec, dict[str, Tensor], Origin]:
    if is_file(source):
        metadata, weights = read_tensors(source)
        spec, origin = _of_file(source, metadata)
    elif _is_folder(source):
        spec, origin, weights_url = _of_folder(source)
        weights = read_tensors(weights_url)[1]
    else:
        spec, origin, weights = _use_checkpoint(source, step, lambda checkpoint: _read_checkpoint(checkpoint, ema))
    origin.check(source, ema, step)
    return spec, weights, origin


def _read_checkpoint(checkpoint: Checkpoint, ema: float | None) -> tuple[ModelSpec, Origin, dict[str, Tensor]]:
    return *_of_checkpoint(checkpoint, ema), checkpoint.weights(ema_state(checkpoint, ema))


def _of_checkpoint(checkpoint: Checkpoint, ema: float | None) -> tuple[ModelSpec, Origin]:
    meta, config = checkpoint.meta, from_yaml(checkpoint.meta.config)  # whose plugins the spec may need
    ema_state(checkpoint, ema)  # refuses an average that is not held
    decay = config.ema.decays[0] if ema is None else ema
    return ModelSpec.from_json(meta.spec), Origin(config.run.name, meta.step, meta.images_seen, decay)


def read_spec(source: str, ema: float | None = None, step: int | None = None) -> tuple[ModelSpec, str]:
    """The spec that `read` would give, and what the weights are in words, without reading them.

    Raises:
        UserError: as `read`, where it can be known without the weights.
    """
    if is_export(source):
        spec, origin = _of_file(source, _header(source)) if is_file(source) else _of_folder(source)[:2]
        origin.check(source, ema, step)
        return spec, source
    checkpoint = _use_checkpoint(source, step, lambda checkpoint: checkpoint)
    state = ema_state(checkpoint, ema)
    spec, origin = _of_checkpoint(checkpoint, ema)
    origin.check(source, ema, step)
    return spec, f"{checkpoint.url} ({state})"


def _of_file(source: str, metadata: dict[str, str]) -> tuple[ModelSpec, Origin]:
    if _SPEC_KEY not in metadata:
        raise UserError(
            f"{source} carries no model spec: write it with `imm-scale export`, or where it holds published weights of "
            "DiT or SiT with `imm-scale import`"
        )
    return ModelSpec.from_json(metadata[_SPEC_KEY]), Origin(**json.loads(metadata.get(_ORIGIN_KEY, "{}")))


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


def _of_folder(source: str) -> tuple[ModelSpec, Origin, str]:
    """Spec, origin and where the weights are."""
    url = storage.join(source, pipeline_folder.RECORD)
    if storage.exists(url):
        record = _fields(url)
        weights_url = storage.join(source, pipeline_folder.TRANSFORMER, pipeline_folder.WEIGHTS)
        return _spec(url, record.get("spec")), Origin(**record.get("weights", {})), weights_url
    url = storage.join(source, _FOLDER_CONFIG)
    fields = _fields(url)
    if fields.pop("_class_name", None) != _CLASS_NAME:
        raise UserError(f"{url} describes no model of imm-scale: write it with `imm-scale export --format diffusers`")
    return _spec(url, fields), Origin(), storage.join(source, pipeline_folder.WEIGHTS)


def _fields(url: str) -> dict[str, Any]:
    """The JSON object of a file; nothing where it is another value."""
    try:
        fields = json.loads(storage.read_bytes(url))
    except ValueError as error:
        raise UserError(f"{url} is not JSON ({error}): write the folder with `imm-scale export`") from error
    return fields if isinstance(fields, dict) else {}


def _spec(url: str, fields: Any) -> ModelSpec:
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


def load_net(source: str, ema: float | None = None, step: int | None = None) -> tuple[ModelSpec, Any]:
    """A net as its method wraps it, ready to sample: in eval mode, without gradients."""
    return load(source, ema, step)[:2]


def load(source: str, ema: float | None = None, step: int | None = None) -> tuple[ModelSpec, Any, Origin]:
    """As `load_net`, and which weights they are."""
    spec, weights, origin = _read(source, ema, step)
    net = build.net(spec)
    put(net, weights, source)
    return spec, net.eval().requires_grad_(False), origin


def identity(spec: ModelSpec, net: Any) -> str:
    """sha256 of the spec and of every weight: equal for an export and the run it came from."""
    digest = hashlib.sha256(spec.to_json().encode())
    for name, value in sorted(net.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def put(net: Any, weights: dict[str, Tensor], source: str) -> None:
    """Copies weights into the net. Raises UserError where names or shapes do not fit."""
    try:
        net.model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights of {source} do not fit this model: {error}") from error


def export(
    source: str,
    out: str,
    ema: float | None = None,
    step: int | None = None,
    format: str = "safetensors",
    vae: str | None = None,
) -> None:
    """Writes the weights of a run (or of another export) and everything needed to sample from them, as `write` does."""
    check_out(out, format, vae)
    spec, weights, origin = _read(source, ema, step)
    write(spec, weights, out, format, origin, vae)


def write(
    spec: ModelSpec,
    weights: dict[str, Tensor],
    out: str,
    format: str = "safetensors",
    origin: Origin | None = None,
    vae: str | None = None,
) -> None:
    """Writes spec and weights: `safetensors` to one file, `diffusers` to a folder. `read` gives back shapes and bits.

    Args:
        origin: which weights these are, as far as it is known.
        vae: folder of the autoencoder to put into a `diffusers` folder.

    Raises:
        UserError: an unknown format, a name that does not fit it, or a model that `pipeline_folder.check` refuses.
    """
    check_out(out, format, vae)
    said = {key: value for key, value in asdict(origin or Origin()).items() if value is not None}
    if format == "safetensors":
        _write_tensors(weights, out, {_SPEC_KEY: spec.to_json(), _ORIGIN_KEY: json.dumps(said)})
        return
    pipeline_folder.check(spec)
    for name in (pipeline_folder.RECORD, pipeline_folder.INDEX, _FOLDER_CONFIG, pipeline_folder.WEIGHTS):
        storage.remove(storage.join(out, name))  # while they are missing it is no export: never new code, old weights
    if vae is not None:
        pipeline_folder.write_vae(spec, vae, out)
    _write_tensors(weights, storage.join(out, pipeline_folder.TRANSFORMER, pipeline_folder.WEIGHTS), {"format": "pt"})
    for name, text in pipeline_folder.files(spec, said, vae is not None).items():
        storage.write_text(storage.join(out, name), text)


def check_out(out: str, format: str, vae: str | None = None) -> None:
    """Raises UserError for an unknown format, or a name or an autoencoder that does not fit it."""
    storage.check_writable(storage.parent(out))
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if format == "safetensors" and not is_file(out):
        raise UserError(f"--out {out}: the name must end in .safetensors, or give --format diffusers for a folder")
    if format == "safetensors" and vae is not None:
        raise UserError(f"--vae {vae}: a .safetensors file holds no autoencoder: leave it out, or --format diffusers")
    if format == "diffusers" and is_file(out):
        raise UserError(f"--out {out}: --format diffusers writes a folder, give a name without .safetensors")
    if format == "diffusers" and storage.exists(storage.join(out, "config.yaml")):
        raise UserError(f"--out {out} is a run folder: export to another one")
    if format == "diffusers" and _is_foreign(out):
        raise UserError(f"--out {out} holds a model that imm-scale did not write: export to another folder")


def _is_foreign(folder: str) -> bool:
    """Whether a folder holds a model of another program."""
    if storage.exists(storage.join(folder, pipeline_folder.RECORD)):
        return False
    config = storage.join(folder, _FOLDER_CONFIG)
    if storage.exists(config):
        return _fields(config).get("_class_name") != _CLASS_NAME
    return storage.exists(storage.join(folder, pipeline_folder.INDEX))


def _write_tensors(weights: dict[str, Tensor], url: str, metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        path = os.path.join(temporary, "weights.safetensors")
        try:
            save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata)
        except SafetensorError as error:  # its words of an OSError, as "No space left on device (os error 28)"
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else None, str(error), url) from error
        storage.write_file(url, path)
