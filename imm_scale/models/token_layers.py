"""Parts of the token transformer: attention with rotary positions, a causal mask and kept keys, and its block.

Legend: N samples, T tokens, D width, H heads, K head width, P places of a cache, C width of the condition.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imm_scale.models.layers import Mlp, adaln_projection, attend, keyed_dropout, modulate

_ROTARY_PERIOD = 10000.0


class KeyValues(NamedTuple):
    """Keys and values (N, P, H, K) of one block, each at the place of its token; later calls write over places."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, samples: int, places: int, heads: int, head_width: int, like: Tensor) -> "KeyValues":
        """For so many samples and places, (N, P, H, K), of the type and device of `like`."""
        shape = samples, places, heads, head_width
        return cls(like.new_zeros(shape), like.new_zeros(shape))


def rotary_angles(place_NT: Tensor, head_width: int) -> Tensor:
    """(N, T, 1, K / 2) fp32 angles of the rotations of Su et al. (RoFormer, arXiv 2104.09864, eq 15)."""
    half = head_width // 2
    frequency = _ROTARY_PERIOD ** (-torch.arange(half, device=place_NT.device, dtype=torch.float64) / half)
    return (place_NT[..., None, None] * frequency).float()


def rotated(x_NTHK: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys (N, T, H, K), of each pair (k, k + K/2) rotated by its angle, in fp32 or better."""
    wide = torch.promote_types(x_NTHK.dtype, torch.float32)
    first, second = x_NTHK.to(wide).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_NTHK.dtype)


class TokenAttention(nn.Module):
    """Multi-head self-attention over tokens, causal or not, with rotary positions or none of its own."""

    def __init__(self, width: int, heads: int, qk_norm: bool, attention: str, causal: bool, rotary: bool):
        super().__init__()
        self.heads, self.attention, self.causal, self.rotary = heads, attention, causal, rotary
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        head_width = width // heads
        self.q_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()

    def forward(self, x_NTD: Tensor, place_NT: Tensor, kept: KeyValues | None = None) -> Tensor:
        """(N, T, D) of tokens at these places; with `kept`, whose places it fills, they see all kept up to theirs."""
        n, t, d = x_NTD.shape
        q, k, v = self.qkv(x_NTD).view(n, t, 3, self.heads, d // self.heads).unbind(2)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rotary:
            angles = rotary_angles(place_NT, d // self.heads)
            q, k = rotated(q, angles), rotated(k, angles)
        attended = self._attended(q, k, v) if kept is None else _attended_kept(q, k, v, place_NT, kept)
        return self.proj(attended.reshape(n, t, d))

    def _attended(self, q_NTHK: Tensor, k_NTHK: Tensor, v_NTHK: Tensor) -> Tensor:
        if not self.causal:
            return attend(q_NTHK, k_NTHK, v_NTHK, self.attention)
        q, k, v = (x.transpose(1, 2) for x in (q_NTHK, k_NTHK, v_NTHK))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _attended_kept(q_NTHK: Tensor, k_NTHK: Tensor, v_NTHK: Tensor, place_NT: Tensor, kept: KeyValues) -> Tensor:
    """Attention to all kept places up to each query's own, these tokens' keys and values written there first."""
    sample = torch.arange(len(place_NT), device=place_NT.device)[:, None]
    kept.keys[sample, place_NT], kept.values[sample, place_NT] = k_NTHK, v_NTHK
    seen = torch.arange(kept.keys.shape[1], device=place_NT.device) <= place_NT[:, :, None]
    q, k, v = (x.transpose(1, 2) for x in (q_NTHK, kept.keys, kept.values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None]).transpose(1, 2)


class TokenBlock(nn.Module):
    """The DiT's block (`layers.Block`) around attention over tokens; its condition is narrower, for it is a label."""

    def __init__(
        self,
        width: int,
        condition_width: int,
        mlp_ratio: float,
        dropout: float,
        attention: TokenAttention,
    ):
        super().__init__()
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = adaln_projection(width, 6, condition_width)

    def forward(
        self,
        x_NTD: Tensor,
        condition_NC: Tensor,
        place_NT: Tensor,
        dropout_key_N: Tensor | None = None,
        kept: KeyValues | None = None,
    ) -> Tensor:
        """(N, T, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition_NC).chunk(6, dim=1)
        attended = self.attn(modulate(self.norm1(x_NTD), shift_a, scale_a), place_NT, kept)
        attended = keyed_dropout(attended, self.dropout, dropout_key_N, stream=0)
        x_NTD = x_NTD + gate_a[:, None] * attended
        mixed = self.mlp(modulate(self.norm2(x_NTD), shift_m, scale_m))
        mixed = keyed_dropout(mixed, self.dropout, dropout_key_N, stream=1)
        return x_NTD + gate_m[:, None] * mixed

    @torch.no_grad()
    def open_gates(self) -> None:
        """Modulation that is told nothing yet: no shift, no scale, gates of 1."""
        modulation = self.adaLN_modulation[-1]
        assert isinstance(modulation, nn.Linear)
        nn.init.zeros_(modulation.weight)
        for part, value in enumerate((0.0, 0.0, 1.0, 0.0, 0.0, 1.0)):
            modulation.bias.view(6, -1)[part] = value
