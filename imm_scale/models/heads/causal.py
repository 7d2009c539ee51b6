"""A causal transformer over the tokens of S: whole sequences at once, or a place at a time against cached keys.

Legend: N samples, K places, D width, H heads, C head width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imm_scale.models.layers import Mlp
from imm_scale.models.token_layers import rotary_angles, rotated

Cache = tuple[Tensor, Tensor]
Caches = Sequence[Cache | None]


class Positions(NamedTuple):
    """Where tokens stand, (N, K) int64: the one each place is to say, and the last one it was told."""

    asked_NK: Tensor
    told_NK: Tensor


class CausalBlock(nn.Module):
    """A pre-norm transformer block in which each place sees itself and those before it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        assert width % heads == 0, (width, heads)
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = Mlp(width, 4 * width)

    def _qkv(self, x_NKD: Tensor, at: Positions) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (N, H, K, C), rotated by where their tokens stand."""
        query, key, value = self.qkv(self.norm1(x_NKD)).unflatten(-1, (3, self.heads, -1)).unbind(dim=2)
        asking, told = (rotary_angles(position_NK, query.shape[-1]) for position_NK in at)
        rotated_NKHC = (rotated(query, asking), rotated(key, told), value)
        return tuple(part.transpose(1, 2) for part in rotated_NKHC)

    def _finish(self, x_NKD: Tensor, attended_NHKC: Tensor) -> Tensor:
        x_NKD = x_NKD + self.proj(attended_NHKC.transpose(1, 2).flatten(2))
        return x_NKD + self.mlp(self.norm2(x_NKD))

    def forward(self, x_NKD: Tensor, at: Positions, seen_NKK: Tensor | None = None) -> Tensor:
        """(N, K, D) to the same; which places (N, K, K) each of them sees, None: all up to itself."""
        query, key, value = self._qkv(x_NKD, at)
        mask = None if seen_NKK is None else seen_NKK[:, None]
        attended_NHKC = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return self._finish(x_NKD, attended_NHKC)

    def step(self, x_ND: Tensor, at: Positions, seen: Cache | None, kept_NK: Tensor) -> tuple[Tensor, Cache]:
        """One more place: its output (N, D), and the keys and values of all places, (N, H, K, C) each.

        Args:
            at: (N, 1) each.
            seen: keys and values of the places before, None where this is the first.
            kept_NK: which places each sample sees, this one the last of them.
        """
        query, *own = self._qkv(x_ND[:, None], at)
        keys, values = own if seen is None else (torch.cat(parts, dim=2) for parts in zip(seen, own, strict=True))
        attended_NH1C = F.scaled_dot_product_attention(query, keys, values, attn_mask=kept_NK[:, None, None])
        return self._finish(x_ND[:, None], attended_NH1C)[:, 0], (keys, values)


class CausalTransformer(nn.Module):
    """Blocks and a last norm, in which places see how far the positions of their tokens are from each other.

    What their inputs say of positions would do in the limit; told distances, a head finds neighbours sooner.
    """

    def __init__(self, width: int, heads: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(CausalBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_NKD: Tensor, at: Positions, set_NK: Tensor | None = None) -> Tensor:
        """(N, K, D) to the same.

        Args:
            set_NK: the set it is in: places see no other set. None: there is one alone.
        """
        seen_NKK = None if set_NK is None else (set_NK[:, :, None] == set_NK[:, None]).tril()
        for block in self.blocks:
            x_NKD = block(x_NKD, at, seen_NKK)
        return self.norm(x_NKD)

    def step(self, x_ND: Tensor, at: Positions, seen: Caches, kept_NK: Tensor) -> tuple[Tensor, Caches]:
        """As `CausalBlock.step`, with a cache of each block."""
        caches: list[Cache | None] = []
        for block, cache in zip(self.blocks, seen, strict=True):
            assert isinstance(block, CausalBlock)
            x_ND, grown = block.step(x_ND, at, cache, kept_NK)
            caches.append(grown)
        return self.norm(x_ND), caches
