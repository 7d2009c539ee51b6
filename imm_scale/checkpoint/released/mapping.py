"""The authors' names and conventions as ours: a pickled preconditioner around a DiT as spec and weights."""

import contextlib
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from imm_scale import storage
from imm_scale.build import ModelSpec
from imm_scale.checkpoint.released import unpickler
from imm_scale.checkpoint.released.unpickler import Record, shown
from imm_scale.data.codec import AUTOENCODER_UNKNOWN, VAECodec
from imm_scale.data.manifest import Codec
from imm_scale.data.spaces import Latents
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import PARAMETERIZATIONS, FlowMapConfig
from imm_scale.methods.imm import ImmConfig
from imm_scale.models.dit import SIZES, DiT, DiTConfig
from imm_scale.models.layers import position_table

# Table 5 and section 5 of the specification: what the files do not record.
LABEL_DROP = 0.1
LATENT_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
LATENT_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)
LATENT_FACTOR = 8

_TRAJECTORIES = {"fm": "ot_fm", "vp_cosine": "vp_cosine"}
_PARAMETERIZATIONS = {name: name for name in PARAMETERIZATIONS}
_SECOND_TIMES = {"identity": "s", "stride": "t_minus_s"}
_RENAMED = {"x_embedder.proj.": "x_embedder.", "y_embedder.embedding_table.": "y_embedder."}
# Attributes that change what a net computes and show in none of its weights: the only values our net has.
_ONLY_VALUES = {"approximate": "tanh", "eps": 1e-6, "embedding_type": "positional", "s_embed": True, "skip": False}
_POSITIONS = "pos_embed"
_POSITION_TOLERANCE = 1e-6  # both tables are fp64 sines rounded to fp32
_MAX_MODULES = 5_000  # DiT-XL has 600
_MAX_DEPTH = 16


@dataclass(frozen=True)
class Released:
    """A released checkpoint in our terms; `notes` says what was read, overridden or not recorded."""

    spec: ModelSpec
    weights: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Network:
    """The network inside the preconditioner: tensors and module attributes by dotted path, as in a state dict."""

    tensors: dict[str, Tensor]
    attributes: dict[str, dict[str, Any]]

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        if name not in self.tensors or self.tensors[name].dim() != dimensions or 0 in self.tensors[name].shape:
            shape = list(self.tensors[name].shape) if name in self.tensors else "nothing"
            raise UserError(f"it holds {shape} for {name}, a tensor of {dimensions} dimensions is needed")
        return tuple(self.tensors[name].shape)


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
    weights_hash = AUTOENCODER_UNKNOWN if vae is None else _autoencoder_hash(vae)
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
    config = _net_config(network, recorded)
    weights = _weights(network, config)
    _check_positions(network, config)
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
        codec=_codec(config, weights_hash),
        num_classes=config.num_classes,
        class_names=(),
    )
    return Released(ModelSpec(method.resolved("fp32"), config, space), weights, tuple(notes))


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


def _flattened(model: Record) -> _Network:
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
    return _Network(tensors, attributes)


def _check_attributes(network: _Network) -> None:
    for path, attributes in network.attributes.items():
        for name, value in _ONLY_VALUES.items():
            recorded = attributes.get(name, value)
            if type(recorded) is not type(value) or recorded != value:
                raise UserError(f"it records {path}{name}={shown(recorded)}; this net has {value!r} only")


def _net_config(network: _Network, recorded: dict[str, Any]) -> DiTConfig:
    """The net's shape, from the shapes of its weights; what the file records besides must agree."""
    width, channels, patch, patch_columns = network.shape("x_embedder.proj.weight", 4)
    _, tokens, _ = network.shape(_POSITIONS, 3)
    hidden, _ = network.shape("blocks.0.mlp.fc1.weight", 2)
    rows, _ = network.shape("y_embedder.embedding_table.weight", 2)
    side = math.isqrt(tokens)
    if patch != patch_columns or side * side != tokens or rows < 2:
        raise UserError(f"it has {tokens} positions, patches of {patch} x {patch_columns}, {rows} label rows")
    shape = {"img_resolution": side * patch, "img_channels": channels, "label_dim": rows - 1}
    for name, value in shape.items():
        if name in recorded and (type(recorded[name]) is not int or recorded[name] != value):
            raise UserError(f"it records {name}={shown(recorded[name])}, its weights are of {value}")
    depth = len({match[1] for name in network.tensors if (match := re.match(r"blocks\.(\d+)\.", name))})
    return DiTConfig(
        width=width,
        depth=depth,
        heads=_heads(network, width, depth),
        patch_size=patch,
        channels=channels,
        height=side * patch,
        image_width=side * patch,
        num_classes=rows - 1,
        mlp_ratio=hidden / width,
    )


def _heads(network: _Network, width: int, depth: int) -> int:
    """Attention heads, which no weight shows: as the modules record them, else by the size table."""
    places = [path for path in network.attributes if path == "" or re.fullmatch(r"blocks\.\d+\.attn\.", path)]
    recorded = [value for path in places if (value := network.attributes[path].get("num_heads")) is not None]
    candidates = recorded or [heads for w, d, heads in SIZES.values() if (w, d) == (width, depth)]
    if not candidates:
        raise UserError(
            f"it records no num_heads, and a net {width} wide and {depth} deep is none of DiT-{', DiT-'.join(SIZES)}"
        )
    for heads in candidates:
        if type(heads) is not int or heads < 1 or width % heads or heads != candidates[0]:
            raise UserError(f"it records num_heads={shown(heads)} for one of its attentions, {width} wide")
    return candidates[0]


def _check_positions(network: _Network, config: DiTConfig) -> None:
    """Our net computes its positions: the file's must be the same table."""
    side = config.height // config.patch_size
    ours = position_table(config.width, side, side)
    theirs = network.tensors[_POSITIONS][0]
    if theirs.shape != ours.shape or not ((theirs.double() - ours).abs() <= _POSITION_TOLERANCE).all():
        raise UserError(
            f"its {_POSITIONS} is not the sin-cos table of a {side} x {side} grid (column first, sines before cosines)"
        )


def _our_name(name: str) -> str:
    for theirs, ours in _RENAMED.items():
        name = name.replace(theirs, ours) if name.startswith(theirs) else name
    return name


def _weights(network: _Network, config: DiTConfig) -> dict[str, Tensor]:
    """fp32 weights under our names: every one of ours filled, none of theirs left."""
    with torch.device("meta"):
        needed = {name: value.shape for name, value in DiT(config).state_dict().items()}
    weights = {}
    for theirs in sorted(network.tensors.keys() - {_POSITIONS}):
        ours, value = _our_name(theirs), network.tensors[theirs]
        if ours not in needed:
            raise UserError(f"it holds {shown(theirs)}, which this net has no place for")
        if value.shape != needed[ours] or not value.is_floating_point():
            raise UserError(f"its {theirs} is {value.dtype} {list(value.shape)}, needed: {list(needed[ours])}")
        weights[ours] = value.float().contiguous()
    missing = sorted(needed.keys() - weights.keys())
    if missing:
        raise UserError(f"it has no {missing[0]} ({len(missing)} weights are missing)")
    return weights


def _autoencoder_hash(vae: str) -> str:
    autoencoder = VAECodec(vae)
    channels = len(LATENT_MEAN)
    if (autoencoder.factor, autoencoder.latent_channels(3)) != (LATENT_FACTOR, channels):
        raise UserError(
            f"the autoencoder in {vae} has {autoencoder.latent_channels(3)} channels and a factor of "
            f"{autoencoder.factor}; the released nets draw latents of {channels} and {LATENT_FACTOR}, as sd-vae-ft-ema"
        )
    return autoencoder.weights_hash


def _codec(config: DiTConfig, weights_hash: str) -> Codec:
    """The published latents: of the SD autoencoder, without its 0.18215 factor."""
    channels = len(LATENT_MEAN)
    if config.channels != channels:
        raise UserError(f"its images have {config.channels} channels, latents of {channels} are needed")
    return Codec("vae", weights_hash, config.height * LATENT_FACTOR, channels, LATENT_FACTOR, LATENT_MEAN, LATENT_STD)


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
