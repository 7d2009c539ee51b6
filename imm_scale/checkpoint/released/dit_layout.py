"""What a DiT is called elsewhere: names and conventions of the published transformers as our net's.

DiT (github.com/facebookresearch/DiT, models.py at ed81ce2), SiT (github.com/willisma/SiT, models.py at 947f95b) and the
nets of IMM's authors share the names of modules, the order of a patch's values, and the table of positions.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imm_scale.build import ModelSpec
from imm_scale.checkpoint.released.unpickler import shown
from imm_scale.data.codec import AUTOENCODER_UNKNOWN, VAECodec
from imm_scale.data.manifest import Codec
from imm_scale.errors import UserError
from imm_scale.models.dit import SIZES, DiT, DiTConfig
from imm_scale.models.layers import position_table

LATENT_CHANNELS, LATENT_FACTOR = 4, 8  # of the Stable Diffusion autoencoders
_RENAMED = {"x_embedder.proj.": "x_embedder.", "y_embedder.embedding_table.": "y_embedder."}
_POSITIONS = "pos_embed"
_POSITION_TOLERANCE = 1e-6  # both tables are fp64 sines rounded to fp32


@dataclass(frozen=True)
class Released:
    """A released checkpoint in our terms; `notes` says what was read, overridden or not recorded."""

    spec: ModelSpec
    weights: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Network:
    """A foreign network: tensors and module attributes by dotted path, as in a state dict."""

    tensors: dict[str, Tensor]
    attributes: dict[str, dict[str, Any]]

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Of a tensor that must be there and have so many dimensions, none of them 0. Raises UserError."""
        if name not in self.tensors or self.tensors[name].dim() != dimensions or 0 in self.tensors[name].shape:
            shape = list(self.tensors[name].shape) if name in self.tensors else "nothing"
            raise UserError(f"it holds {shape} for {name}, a tensor of {dimensions} dimensions is needed")
        return tuple(self.tensors[name].shape)


def net_config(network: Network, second_time: bool) -> DiTConfig:
    """The net's shape, from the shapes of its weights. Raises UserError."""
    width, channels, patch, patch_columns = network.shape("x_embedder.proj.weight", 4)
    _, tokens, _ = network.shape(_POSITIONS, 3)
    hidden, _ = network.shape("blocks.0.mlp.fc1.weight", 2)
    rows, _ = network.shape("y_embedder.embedding_table.weight", 2)
    side = math.isqrt(tokens)
    if patch != patch_columns or side * side != tokens or rows < 2:
        raise UserError(f"it has {tokens} positions, patches of {patch} x {patch_columns}, {rows} label rows")
    depth = len({match[1] for name in network.tensors if (match := re.match(r"blocks\.(\d+)\.", name))})
    return DiTConfig(
        width=width,
        depth=depth,
        heads=heads_of(network, width, depth),
        patch_size=patch,
        channels=channels,
        height=side * patch,
        image_width=side * patch,
        num_classes=rows - 1,
        mlp_ratio=hidden / width,
        second_time=second_time,
    )


def heads_of(network: Network, width: int, depth: int) -> int:
    """Attention heads, which no weight shows: as the modules record them, else by the size table. Raises UserError."""
    places = [path for path in network.attributes if path == "" or re.fullmatch(r"blocks\.\d+\.attn\.", path)]
    recorded = [value for path in places if (value := network.attributes[path].get("num_heads")) is not None]
    candidates = recorded or [heads for w, d, heads in SIZES.values() if (w, d) == (width, depth)]
    if not candidates:
        raise UserError(
            f"it records no num_heads, and a net {width} wide and {depth} deep is none of DiT-{', DiT-'.join(SIZES)}: "
            "of a state dict, give them with --heads"
        )
    for heads in candidates:
        if type(heads) is not int or heads < 1 or width % heads or heads != candidates[0]:
            raise UserError(f"it records num_heads={shown(heads)} for one of its attentions, {width} wide")
    return candidates[0]


def check_positions(network: Network, config: DiTConfig) -> None:
    """Our net computes its positions: raises UserError where the file's are not the same table."""
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


def renamed_weights(network: Network, config: DiTConfig) -> dict[str, Tensor]:
    """fp32 weights under our names. Raises UserError where one of ours is not filled, or one of theirs left over."""
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


def autoencoder_hash(vae: str | None) -> str:
    """Of the weights in a folder, None where none is named. Raises UserError for an autoencoder of another shape."""
    if vae is None:
        return AUTOENCODER_UNKNOWN
    autoencoder, channels = VAECodec(vae), LATENT_CHANNELS
    if (autoencoder.factor, autoencoder.latent_channels(3)) != (LATENT_FACTOR, channels):
        raise UserError(
            f"the autoencoder in {vae} has {autoencoder.latent_channels(3)} channels and a factor of "
            f"{autoencoder.factor}; the released nets draw latents of {channels} and {LATENT_FACTOR}, as sd-vae-ft-ema"
        )
    return autoencoder.weights_hash


def codec_of(config: DiTConfig, weights_hash: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Codec:
    """The published latents: of an SD autoencoder, without its factor of 0.18215. Raises UserError."""
    channels = LATENT_CHANNELS
    if config.channels != channels:
        raise UserError(f"its images have {config.channels} channels, latents of {channels} are needed")
    return Codec("vae", weights_hash, config.height * LATENT_FACTOR, channels, LATENT_FACTOR, mean, std)
