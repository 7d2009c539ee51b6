"""Counter-based random numbers: every draw is a pure function of (seed, purpose, ordinal).

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written in
int64 tensor arithmetic so that one call serves a whole batch on any device. Nothing here has state: a sample gets
the same noise on whichever rank, in whichever micro-batch, before or after a resume.
"""

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one (broadcastable) shape, each holding a 32-bit word.
        key: two 32-bit words.

    Returns:
        Four int64 tensors, each holding 32 random bits.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit products wrap into the sign bit; the shift is arithmetic, so the high words are masked.
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high_0, high_1 = (product_0 >> 32) & _MASK, (product_1 >> 32) & _MASK
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, product_1 & _MASK, high_0 ^ c3 ^ k1, product_0 & _MASK
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


@torch.compiler.assume_constant_result  # hashlib cannot be traced
def derive_key(seed: int, purpose: str) -> tuple[int, int]:
    """The Philox key of a purpose ("noise", "times", ...) under a seed: two 32-bit words of a hash of both."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _words(seed: int, purpose: str, ordinal_N: Tensor, blocks: int, stream: int) -> Tensor:
    """(N, blocks, 4) int64 tensor of 32-bit words; `stream` tells apart draws of one purpose (a layer, say)."""
    if not 0 <= stream <= _MASK:
        raise ValueError(f"stream must be a 32-bit number, got {stream}")
    ordinal = ordinal_N.to(torch.int64)[:, None]
    block = torch.arange(blocks, device=ordinal.device)[None, :]
    counter = (block, torch.full_like(block, stream), ordinal & _MASK, (ordinal >> 32) & _MASK)
    return torch.stack(philox4x32(counter, derive_key(seed, purpose)), dim=-1)


def uniform(seed: int, purpose: str, ordinal_N: Tensor, count: int = 1, stream: int = 0) -> Tensor:
    """float64 uniforms in [0, 1) with 53 random bits, shape (N, count), one row per ordinal."""
    words = _words(seed, purpose, ordinal_N, (count + 1) // 2, stream)
    high, low = words[..., 0::2] >> 5, words[..., 1::2] >> 6
    values = (high * (1 << 26) + low).to(torch.float64) * 2.0**-53
    return values.flatten(1)[:, :count]


def random_bits(seed: int, purpose: str, ordinal_N: Tensor, stream: int = 0) -> Tensor:
    """63 random bits per ordinal as a non-negative int64 tensor of shape (N,): sort keys for permutations."""
    words = _words(seed, purpose, ordinal_N, 1, stream)
    return (words[:, 0, 0] << 31) | (words[:, 0, 1] >> 1)


def normal(seed: int, purpose: str, ordinal_N: Tensor, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """Standard normals in fp32, shape (N, *shape), by Box and Muller's transform in fp64.

    The largest magnitude is sqrt(2 * 33 * ln 2) = 6.76, met once in 2^33 draws.
    """
    size = math.prod(shape)
    words = _words(seed, purpose, ordinal_N, (size + 3) // 4, stream).to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((words[..., 0::2] + 0.5) * 2.0**-32))
    angle = words[..., 1::2] * (2.0 * math.pi * 2.0**-32)
    pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :size].to(torch.float32).reshape(-1, *shape)
