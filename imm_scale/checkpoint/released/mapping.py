"""The checkpoints of IMM's authors: a pickled preconditioner around a DiT as spec and weights."""

import contextlib
import io
from collections.abc import Iterator
from typing import IO, Any

from torch import Tensor

from imm_scale import storage
from imm_scale.build import ModelSpec
from imm_scale.checkpoint.released import unpickler
from imm_scale.checkpoint.released.dit_layout import (
    Network,
    Released,
    autoencoder_hash,
    check_positions,
    codec_of,
    net_config,
    renamed_weights,
)
from imm_scale.checkpoint.released.unpickler import Record, shown
from imm_scale.data.codec import AUTOENCODER_UNKNOWN
from imm_scale.data.spaces import Latents
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMapConfig
from imm_scale.methods.imm import ImmConfig
from imm_scale.models.dit import DiTConfig

# Table 5 and section 5 of the specification: what the files do not record.
LABEL_DROP = 0.1
LATENT_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
LATENT_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)

_TRAJECTORIES = {"fm": "ot_fm", "vp_cosine": "vp_cosine"}
_PARAMETERIZATIONS = {name: name for name in ("identity", "simple_edm", "euler_fm")}
_SECOND_TIMES = {"identity": "s", "stride": "t_minus_s"}
# Attributes that change what a net computes and show in none of its weights: the only values our net has.
_ONLY_VALUES = {"approximate": "tanh", "eps": 1e-6, "embedding_type": "positional", "s_embed": True, "skip": False}
_MAX_MODULES = 5_000  # DiT-XL has 600
_MAX_DEPTH = 16


def read(source: str, second_time: str | None = None, vae: str | None = None) -> Released:
    """A checkpoint as its authors released it: a pickle whose `ema` is a preconditioner around a DiT.

    Args:
        source: the .pkl file, a path or any fsspec URL.
        second_time: `s` or `t_minus_s` in place of what the file records.
        vae: folder of the autoencoder whose latents the net draws; its weights' hash goes into the spec.

    Raises:
        UserError: a file that is no such pickle or holds anything unexpected (by its name), a weight that is missing,
            left over or of the wrong shape, a foreign position table, or an autoencoder of another shape.
    """
    if second_time not in (None, *_SECOND_TIMES.values()):
        raise UserError(f"second_time {second_time!r} is unknown; choose one of {', '.join(_SECOND_TIMES.values())}")
    weights_hash = autoencoder_hash(vae)
    with _opened(source) as file:
        document = unpickler.load(file, source)
    try:
        return _converted(document, second_time, weights_hash)
    except UserError as error:
        raise UserError(f"{source} is no checkpoint this importer knows: {error}") from error


@contextlib.contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    if not storage.exists(source):
        raise UserError(f"{source} does not exist: name a downloaded .pkl file")
    if not storage.is_local(source):
        yield io.BytesIO(storage.read_bytes(source))
        return
    try:
        with open(storage.local_path(source), "rb") as file:
            yield file
    except IsADirectoryError as error:
        raise UserError(f"{source} is a folder: name a downloaded .pkl file") from error


def _converted(document: Any, second_time: str | None, weights_hash: str) -> Released:
    preconditioner = document.get("ema") if isinstance(document, dict) else None
    if not isinstance(preconditioner, Record):
        raise UserError("it is not a dict whose `ema` is a network")
    recorded = preconditioner.state
    network = _flattened(_model(preconditioner))
    config = net_config(network, second_time=True)
    _check_recorded(recorded, config)
    weights = renamed_weights(network, config)
    check_positions(network, config)
    _check_attributes(network)
    second, note = _second_time(recorded, second_time)
    notes = [note]
    if weights_hash == AUTOENCODER_UNKNOWN:
        notes.append("the file does not say of which autoencoder its latents are: name it with --vae to decode images")
    names: dict[str, Any] = {
        "trajectory": _choice(recorded, "noise_schedule", _TRAJECTORIES),
        "parameterization": _choice(recorded, "f_type", _PARAMETERIZATIONS),
        "second_time": second,
    }
    method = ImmConfig(
        flow_map=FlowMapConfig(**names, time_scale=_number(recorded, "time_scale", 1e-3, 1e6)),
        t_min=_number(recorded, "eps", 0.0, 0.1),
        t_max=_number(recorded, "T", 0.5, 1.0),
        label_drop=LABEL_DROP,
    )
    method.flow_map.validate()
    space = Latents(
        sigma_data=_number(recorded, "sigma_data", 1e-3, 1e3),
        shape=(config.channels, config.height, config.image_width),
        codec=codec_of(config, weights_hash, LATENT_MEAN, LATENT_STD),
        num_classes=config.num_classes,
        class_names=(),
    )
    return Released(ModelSpec(method.resolved("fp32"), config, space), weights, tuple(notes))


def _check_recorded(recorded: dict[str, Any], config: DiTConfig) -> None:
    """What the file says of the net's shape must agree with its weights."""
    shape = {"img_resolution": config.height, "img_channels": config.channels, "label_dim": config.num_classes}
    for name, value in shape.items():
        if name in recorded and (type(recorded[name]) is not int or recorded[name] != value):
            raise UserError(f"it records {name}={shown(recorded[name])}, its weights are of {value}")


def _model(preconditioner: Record) -> Record:
    modules = preconditioner.state.get("_modules")
    model = modules.get("model") if isinstance(modules, dict) else None
    if not isinstance(modules, dict) or not isinstance(model, Record) or len(modules) != 1:
        raise UserError(f"{shown(preconditioner)} is no preconditioner around one `model`")
    own = [*_named(preconditioner.state, "_parameters"), *_named(preconditioner.state, "_buffers")]
    if own:
        raise UserError(f"{shown(preconditioner)} has weights of its own, as {shown(own[0][0])}")
    return model


def _named(state: dict[str, Any], kind: str) -> list[tuple[str, Any]]:
    """What a module keeps under `_parameters`, `_buffers` or `_modules`, without the empty places."""
    entries = state.get(kind, {})
    if not isinstance(entries, dict) or not all(isinstance(name, str) and "." not in name for name in entries):
        raise UserError(f"a module's {kind} are {shown(entries)}, not a dict by names without dots")
    return [(name, value) for name, value in entries.items() if value is not None]


def _flattened(model: Record) -> Network:
    """Walks the modules. A pickle may hold a module in itself, or under exponentially many paths: both are counted."""
    tensors: dict[str, Tensor] = {}
    attributes: dict[str, dict[str, Any]] = {}
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        attributes[prefix] = module.state
        if len(attributes) > _MAX_MODULES or prefix.count(".") > _MAX_DEPTH:
            raise UserError(f"its network has over {_MAX_MODULES} modules, or modules nested over {_MAX_DEPTH} deep")
        for name, value in [*_named(module.state, "_parameters"), *_named(module.state, "_buffers")]:
            if not isinstance(value, Tensor):
                raise UserError(f"{shown(prefix + name)} is {shown(value)}, not a tensor")
            tensors[prefix + name] = value
        for name, child in _named(module.state, "_modules"):
            if not isinstance(child, Record):
                raise UserError(f"{shown(prefix + name)} is {shown(child)}, not a module")
            waiting.append((f"{prefix}{name}.", child))
    return Network(tensors, attributes)


def _check_attributes(network: Network) -> None:
    for path, attributes in network.attributes.items():
        for name, value in _ONLY_VALUES.items():
            recorded = attributes.get(name, value)
            if type(recorded) is not type(value) or recorded != value:
                raise UserError(f"it records {path}{name}={shown(recorded)}; this net has {value!r} only")


def _second_time(recorded: dict[str, Any], override: str | None) -> tuple[str, str]:
    """The second time, and a note on where it comes from: the authors set it by hand for one of their files."""
    if override is None:
        if "temb_type" not in recorded:
            raise UserError("it does not record temb_type: give --second-time s or --second-time t_minus_s")
        second = _choice(recorded, "temb_type", _SECOND_TIMES)
        return second, f"second_time={second}, as the file records (--second-time overrides)"
    recorded_type = shown(recorded.get("temb_type"))
    return override, f"second_time={override}, as given; the file records temb_type={recorded_type}"


def _choice(recorded: dict[str, Any], name: str, table: dict[str, str]) -> str:
    value = recorded.get(name)
    if not isinstance(value, str) or value not in table:
        raise UserError(f"it records {name}={shown(value)}; known are {', '.join(table)}")
    return table[value]


def _number(recorded: dict[str, Any], name: str, low: float, high: float) -> float:
    value = recorded.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"it records {name}={shown(value)}; a number from {low:g} to {high:g} is needed")
    return float(value)
