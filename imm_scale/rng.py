"""Counter-based random numbers: every draw is a pure function of (seed, purpose, ordinal).

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written in
array arithmetic so that one call serves a whole batch: int64 tensors on any device, and on CPU the same words in place
in numpy's uint64, in pieces that stay in the cache. Nothing here has state: a sample gets the same noise on whichever
rank, in whichever micro-batch, before or after a resume.
"""

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_PIECE = 1 << 14  # counters worked on at once on CPU: six arrays of 128 KiB fit a core's cache


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one (broadcastable) shape, each holding a 32-bit word.
        key: two 32-bit words.

    Returns:
        Four int64 tensors, each holding 32 random bits.
    """
    words = torch.broadcast_tensors(*counter)
    return _philox_on_cpu(words, key) if _by_numpy(words[0]) else _philox_on_tensors(words, key)


def _by_numpy(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()  # numpy would break the graph


def _philox_on_tensors(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    # A word may carry more than 32 bits as long as it is only xored: it is masked before it is multiplied or returned.
    # Products of 32-bit words overflow int64, which compiled C++ leaves undefined. Both are above 2^31: less
    # 2^32, a product stays within 63 bits, and its high word lacks just the other factor.
    multiplier_0, multiplier_1 = (multiplier - (1 << 32) for multiplier in _MULTIPLIERS)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * multiplier_0, c2 * multiplier_1
        high_0, high_1 = (product_0 >> 32) + c0, (product_1 >> 32) + c2
        c0, c2 = (high_1 ^ c1 ^ k0) & _MASK, (high_0 ^ c3 ^ k1) & _MASK
        c1, c3 = product_1, product_0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _philox_on_cpu(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    shape = counter[0].shape
    words = np.empty((4, *shape), np.int64)
    for i, word in enumerate(counter):
        words[i] = word.numpy()
    flat = words.view(np.uint64).reshape(4, -1)
    for start in range(0, flat.shape[1], _PIECE):
        _philox_in_place(flat[:, start : start + _PIECE], key)
    return tuple(torch.from_numpy(words))


def _philox_in_place(words: NDArray[np.uint64], key: tuple[int, int]) -> None:
    """The rounds of `philox4x32` on (4, n) words; unsigned, so that a shift leaves nothing to mask."""
    c0, c1, c2, c3 = words
    product_0, product_1 = np.empty_like(c0), np.empty_like(c0)
    multiplier_0, multiplier_1 = (np.uint64(m) for m in _MULTIPLIERS)
    shift, mask = np.uint64(32), np.uint64(_MASK)
    k0, k1 = key
    for _ in range(_ROUNDS):
        np.multiply(c0, multiplier_0, out=product_0)
        np.multiply(c2, multiplier_1, out=product_1)
        np.right_shift(product_1, shift, out=c0)
        np.bitwise_xor(c0, c1, out=c0)
        np.bitwise_xor(c0, np.uint64(k0), out=c0)
        np.right_shift(product_0, shift, out=c2)
        np.bitwise_xor(c2, c3, out=c2)
        np.bitwise_xor(c2, np.uint64(k1), out=c2)
        np.bitwise_and(product_1, mask, out=c1)
        np.bitwise_and(product_0, mask, out=c3)
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK


@torch.compiler.assume_constant_result  # hashlib cannot be traced
def derive_key(seed: int, purpose: str) -> tuple[int, int]:
    """The Philox key of a purpose ("noise", "times", ...) under a seed: two 32-bit words of a hash of both."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _words(seed: int, purpose: str, ordinal_N: Tensor, blocks: int, stream: int) -> tuple[Tensor, ...]:
    """Four (N, blocks) int64 tensors of 32-bit words; `stream` tells apart draws of one purpose (a layer, say)."""
    if not 0 <= stream <= _MASK:
        raise ValueError(f"stream must be a 32-bit number, got {stream}")
    ordinal = ordinal_N.to(torch.int64)[:, None]
    # Masked, so that the compiler takes it for data: an index times a multiplier would be an index to it, in int32.
    block = (torch.arange(blocks, device=ordinal.device) & _MASK)[None, :]
    counter = (block, torch.full_like(block, stream), ordinal & _MASK, (ordinal >> 32) & _MASK)
    return philox4x32(counter, derive_key(seed, purpose))


def uniform(seed: int, purpose: str, ordinal_N: Tensor, count: int = 1, stream: int = 0) -> Tensor:
    """float64 uniforms in [0, 1) with 53 random bits, shape (N, count), one row per ordinal."""
    w0, w1, w2, w3 = _words(seed, purpose, ordinal_N, (count + 1) // 2, stream)
    high, low = torch.stack([w0, w2], dim=-1) >> 5, torch.stack([w1, w3], dim=-1) >> 6
    values = (high * (1 << 26) + low).to(torch.float64) * 2.0**-53
    return values.flatten(1)[:, :count]


def random_bits(seed: int, purpose: str, ordinal_N: Tensor, stream: int = 0) -> Tensor:
    """63 random bits per ordinal as a non-negative int64 tensor of shape (N,): sort keys for permutations."""
    w0, w1, _, _ = _words(seed, purpose, ordinal_N, 1, stream)
    return ((w0 << 31) | (w1 >> 1))[:, 0]


def normal(seed: int, purpose: str, ordinal_N: Tensor, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """Standard normals in fp32, shape (N, *shape), by Box and Muller's transform in fp64.

    The largest magnitude is sqrt(2 * 33 * ln 2) = 6.76, met once in 2^33 draws.
    """
    size = math.prod(shape)
    blocks = (size + 3) // 4
    # On CPU a few rows at a time: the fp64 values between words and normals then never leave the cache.
    rows = max(1, _PIECE // max(blocks, 1)) if _by_numpy(ordinal_N) else max(1, len(ordinal_N))
    pieces = [_box_muller(_words(seed, purpose, piece, blocks, stream)) for piece in ordinal_N.split(rows)]
    normals = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return normals.flatten(1)[:, :size].reshape(-1, *shape)


def _box_muller(words: tuple[Tensor, ...]) -> Tensor:
    """(..., 4) normals in fp32 from four words of one shape: of a pair of words one is the radius, one the angle."""
    normals = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = radius_word.to(torch.float64).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = angle_word.to(torch.float64).mul_(2.0 * math.pi * 2.0**-32)
        normals += [torch.cos(angle).mul_(radius).float(), angle.sin_().mul_(radius).float()]
    return torch.stack([normals[0], normals[2], normals[1], normals[3]], dim=-1)
