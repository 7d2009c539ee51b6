"""What is asked of samples in several blocks: steps of each block, and the first blocks where they are given."""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imm_scale import storage
from imm_scale.build import ModelSpec
from imm_scale.config.schema import SamplingConfig
from imm_scale.errors import UserError
from imm_scale.methods.base import Method

_ARRAY = "latents"  # of the npz that `imm-scale sample --latents` writes
_WRITER = "imm-scale sample --latents --format npz writes such files"


def parse(text: str) -> tuple[int, ...]:
    """The step counts of "4-2-1-1". Raises UserError."""
    counts = tuple(int(part) if part.isdecimal() else 0 for part in str(text).split("-"))
    if min(counts) < 1:
        raise UserError(f"sampling.block_steps={text!r}: give a count of at least 1 for each block, as in 4-2-1-1")
    return counts


def times(config: SamplingConfig, spec: ModelSpec, method: Method, steps: int) -> tuple[tuple[float, ...], ...]:
    """The falling times of each block where `sampling.block_steps` gives them their own, else none.

    Raises:
        UserError: a list of another length than the model has blocks, or whose largest count is not `steps`.
    """
    if config.block_steps is None:
        return ()
    counts, blocks = parse(config.block_steps), spec.net.sequence_blocks
    if len(counts) != blocks:
        raise UserError(
            f"sampling.block_steps={config.block_steps} is of {len(counts)} blocks, and the model draws samples in "
            f"{blocks} (model.blocks): give as many counts, or leave it out"
        )
    if max(counts) != steps:
        raise UserError(
            f"sampling.block_steps={config.block_steps} takes {max(counts)} steps at most, not {steps}: use --steps "
            f"{max(counts)}"
        )
    if "," in config.grid and min(counts) != max(counts):
        raise UserError(
            f"sampling.grid={config.grid} beside sampling.block_steps={config.block_steps}: a list of times is of one "
            "number of steps; name a kind of grid, or leave one of them out"
        )
    return tuple(
        tuple(method.grid(method.default_grid(n) if config.grid == "auto" else config.grid, n, spec.space).tolist())
        for n in counts
    )


@dataclass(frozen=True)
class Prefix:
    """The first blocks of samples that are known: sample i continues the latents of number i, or around, in a file.

    Attributes:
        url: an npz with `latents` (n, C, H, W), as `imm-scale sample --latents` writes it.
        blocks: how many are taken.
        sha256: of the file.
    """

    url: str
    blocks: int
    sha256: str

    def of(self, index_N: Tensor, sequence_blocks: int) -> Tensor:
        """(N, C, rows, W) fp64: what is given of the samples of these numbers."""
        latents = _latents(self.url)
        rows = self.blocks * latents.shape[2] // sequence_blocks
        return latents[index_N % len(latents), :, :rows].double()


def prefix(config: SamplingConfig, spec: ModelSpec) -> Prefix | None:
    """What `sampling.given` names. Raises UserError for a file without such samples, or where none is left to draw."""
    if config.given is None:
        if config.given_blocks != 1:
            raise UserError(f"sampling.given_blocks={config.given_blocks} does nothing without sampling.given")
        return None
    blocks = spec.net.sequence_blocks
    if config.given_blocks >= blocks:
        raise UserError(
            f"sampling.given_blocks={config.given_blocks} of the {blocks} that samples are drawn in (model.blocks) "
            f"leaves nothing to draw" + (f": give 1 to {blocks - 1}" if blocks > 1 else "; leave out sampling.given")
        )
    found = tuple(_latents(config.given).shape[1:])
    if found != tuple(spec.space.shape):
        raise UserError(f"sampling.given={config.given} holds latents of {found}, not of {tuple(spec.space.shape)}")
    return Prefix(config.given, config.given_blocks, _sha256(config.given))


def identity(config: SamplingConfig) -> dict[str, Any]:
    """What of this tells an evaluation from another; nothing where samples are drawn as usual."""
    steps = {} if config.block_steps is None else {"block_steps": config.block_steps}
    return steps | ({} if config.given is None else {"given": [_sha256(config.given), config.given_blocks]})


def _sha256(url: str) -> str:
    try:
        return hashlib.sha256(storage.read_bytes(url)).hexdigest()
    except FileNotFoundError as error:
        raise UserError(f"sampling.given={url} is not there") from error


@lru_cache(maxsize=4)
def _latents(url: str) -> Tensor:
    """(n, C, H, W) fp32. Raises UserError."""
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise UserError(f"sampling.given={url} is not there") from error
    latents = _array(url, data)
    if latents.ndim != 4 or not len(latents) or latents.dtype.kind not in "fiu":
        raise UserError(
            f"sampling.given={url} holds {latents.dtype} of shape {latents.shape}, no latents (n, C, H, W): " + _WRITER
        )
    with np.errstate(over="ignore"):  # what fp32 does not hold is infinite, and said to be
        latents = latents.astype(np.float32)
    number = np.isfinite(latents).all(axis=(1, 2, 3))
    if not number.all():
        raise UserError(f"sampling.given={url}: sample {int(np.argmin(number))} is not finite: {_WRITER}")
    return torch.from_numpy(latents)


def _array(url: str, data: bytes) -> NDArray[Any]:
    """The latents of an npz, whatever they are. Raises UserError for another file."""
    if not zipfile.is_zipfile(io.BytesIO(data)):  # numpy would look for a single array, or for a pickle
        raise UserError(f"sampling.given={url} is no npz file: {_WRITER}")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            if _ARRAY not in arrays:
                raise UserError(f"sampling.given={url} has no array {_ARRAY!r}: {_WRITER}")
            found: NDArray[Any] = arrays[_ARRAY]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"sampling.given={url} cannot be read ({error}): {_WRITER}") from error
    return found


def grids(block_times: Sequence[Sequence[float]]) -> list[Tensor]:
    """Each block's times as (steps + 1,) fp64."""
    return [torch.tensor(each, dtype=torch.float64) for each in block_times]
