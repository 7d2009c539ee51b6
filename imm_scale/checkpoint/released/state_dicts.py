"""State dicts of DiT and SiT as spec and weights: velocity and noise prediction in the terms of a flow map.

Both work between N(0, 1) and latents times 0.18215: sigma_data is 1, and the normalization that factor alone. Neither
knows a second time. Their labels end with the row for "no label", as ours.

SiT (arXiv 2401.08740; models.py and transport/ of github.com/willisma/SiT at 947f95b) runs its time u from noise at 0
to data at 1, x_u = u x + (1 - u) eps, and predicts x - eps from x_u as it is. Ours is t = 1 - u: cosines and sines of
w (1 - t) are a rotation of those of w t, which the first linear layer takes up, and the sign of the answer the last.

DiT (arXiv 2212.09748; github.com/facebookresearch/DiT at ed81ce2) predicts the eps of DDPM's linear schedule of 1,000
steps, and the variance of a step besides, which has no place here. At equal noise-to-data ratio its x_k is our x_t over
the norm of (alpha_t, sigma_t), on any trajectory, so `epsilon` and `ddpm_step` say all of it.
"""

import argparse
import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imm_scale import storage
from imm_scale.build import ModelSpec
from imm_scale.checkpoint import export
from imm_scale.checkpoint.released.dit_layout import (
    Network,
    Released,
    autoencoder_hash,
    check_positions,
    codec_of,
    net_config,
    renamed_weights,
)
from imm_scale.checkpoint.released.unpickler import DAMAGED, shown
from imm_scale.data.codec import AUTOENCODER_UNKNOWN
from imm_scale.data.spaces import Latents
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMapConfig
from imm_scale.methods.flow_matching import FlowMatchingConfig
from imm_scale.models.layers import time_frequencies

LATENT_SCALE = 0.18215  # latents are multiplied by this (train.py of both)
LABEL_DROP = 0.1  # class_dropout_prob of both
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_FINAL = "final_layer.linear."
_TIME = "t_embedder.mlp.0.weight"


@dataclass(frozen=True)
class Family:
    """How a family's nets are a flow map.

    Attributes:
        recorded: what the arguments a training script leaves beside the weights must be, where they are there.
        reversed_time: its time is 1 minus ours, and its answer minus ours.
        note: what is left out, for the user.
    """

    flow_map: FlowMapConfig
    t_max: float
    recorded: dict[str, str]
    reversed_time: bool
    note: str


FAMILIES = {
    "sit": Family(
        FlowMapConfig("ot_fm", "velocity", "none", 1.0),
        t_max=1.0,
        recorded={"path_type": "Linear", "prediction": "velocity"},
        reversed_time=True,
        note="taken for SiT's linear path and velocity prediction, which state dicts do not record; exact",
    ),
    "dit": Family(
        FlowMapConfig("ot_fm", "epsilon", "none", 1.0, "ddpm_step"),
        t_max=0.994,
        recorded={},
        reversed_time=False,
        note="DiT's noise prediction, exact at DDPM's 1,000 noise levels and told levels between them in between",
    ),
}


def read(source: str, family: str, heads: int | None = None, vae: str | None = None) -> Released:
    """A published state dict of DiT or SiT: .safetensors, or a .pt of which torch loads weights only.

    Args:
        source: the file, a path or any fsspec URL.
        family: `sit` or `dit`, whose weights have the same names.
        heads: of the attentions, where width and depth are none of the published sizes'.
        vae: folder of the autoencoder whose latents the net draws; its weights' hash goes into the spec.

    Raises:
        UserError: a file that cannot be read so, weights that are missing, left over or of the wrong shape, a foreign
            position table, or arguments beside them that say they mean something else.
    """
    weights_hash = autoencoder_hash(vae)
    document = _loaded(source)
    try:
        tensors, arguments, taken = _state_dict(document)
        _check_arguments(arguments, FAMILIES[family])
        spec, weights = _converted(tensors, FAMILIES[family], heads, weights_hash)
    except UserError as error:
        raise UserError(f"{source} holds no {family} this importer knows: {error}") from error
    unnamed = "the file does not say of which autoencoder its latents are: name it with --vae to decode images"
    notes = [FAMILIES[family].note, taken, unnamed if weights_hash == AUTOENCODER_UNKNOWN else ""]
    return Released(spec, weights, tuple(filter(None, notes)))


def _loaded(source: str) -> Any:
    """What the file holds. argparse's Namespace, in which the training scripts leave their arguments, is data alone."""
    if export.is_file(source):
        return export.read_tensors(source)[1]
    if not storage.exists(source):
        raise UserError(f"{source} does not exist: name a downloaded .pt or .safetensors file")
    try:
        file = storage.local_path(source) if storage.is_local(source) else io.BytesIO(storage.read_bytes(source))
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (*DAMAGED, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{source} cannot be loaded as weights alone, and nothing in it was run: {reason}") from error


def _state_dict(document: Any) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The tensors by name, the arguments of the training script, and which of its weights these are."""
    beside = document.get("args") if isinstance(document, dict) else None
    arguments: dict[str, Any] = dict(vars(beside)) if isinstance(beside, argparse.Namespace) else {}
    where = ""
    for key in ("ema", "model", "state_dict"):
        if isinstance(document, dict) and isinstance(document.get(key), dict):
            document, where = document[key], f"its {key!r} is taken"
            break
    if not isinstance(document, dict) or not document:
        raise UserError("it is no dict of tensors")
    for name, value in document.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{shown(name)} is {shown(value)}, not a tensor under a name")
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in document):
            document = {name.removeprefix(wrapper): value for name, value in document.items()}
    return document, arguments, where


def _check_arguments(arguments: dict[str, Any], family: Family) -> None:
    for key, value in family.recorded.items():
        if arguments.get(key, value) != value:
            raise UserError(f"it was trained with {key}={shown(arguments[key])}; only {value} is known here")


def _converted(
    tensors: dict[str, Tensor], family: Family, heads: int | None, weights_hash: str
) -> tuple[ModelSpec, dict[str, Tensor]]:
    network = Network(_without_variance(tensors), {} if heads is None else {"": {"num_heads": heads}})
    config = net_config(network, second_time=False)
    weights = renamed_weights(network, config)
    check_positions(network, config)
    if family.reversed_time:
        weights[_TIME] = _reversed(weights[_TIME])
        weights |= {name: -weights[name] for name in weights if name.startswith(_FINAL)}
    space = Latents(
        sigma_data=1.0,
        shape=(config.channels, config.height, config.image_width),
        codec=codec_of(config, weights_hash, (0.0,) * config.channels, (1.0 / LATENT_SCALE,) * config.channels),
        num_classes=config.num_classes,
        class_names=(),
    )
    method = FlowMatchingConfig(flow_map=family.flow_map, t_max=family.t_max, label_drop=LABEL_DROP)
    return ModelSpec(method.resolved("fp32"), config, space), weights


def _without_variance(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a final layer of as many channels as the first: half of one that has twice as many.

    Its rows are ordered (row in patch, column in patch, channel), channels of the answer before those of the variance,
    which DiT learns, and SiT keeps without a use.
    """
    first = Network(tensors, {}).shape("x_embedder.proj.weight", 4)
    channels, pixels = first[1], first[2] * first[3]
    made = dict(tensors)
    for name in (f"{_FINAL}weight", f"{_FINAL}bias"):
        value = tensors.get(name)
        if value is not None and value.dim() and value.shape[0] == 2 * channels * pixels:
            rows = value.unflatten(0, (pixels, 2, channels))
            made[name] = rows[:, 0].flatten(0, 1)
    return made


def _reversed(weight: Tensor) -> Tensor:
    """The linear layer (D, 256) on cosines and sines of w t that answers as this one on those of w (1 - t).

    cos(w - wt) = cos w cos wt + sin w sin wt and sin(w - wt) = sin w cos wt - cos w sin wt.
    """
    frequencies = time_frequencies("positional")
    cosine, sine = weight.double().chunk(2, dim=1)
    c, s = frequencies.cos(), frequencies.sin()
    return torch.cat([cosine * c + sine * s, cosine * s - sine * c], dim=1).float()
