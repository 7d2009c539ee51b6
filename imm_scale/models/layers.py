"""Parts of the transformer: attention, the adaLN-Zero block, embedders.

Legend: N samples, T tokens, D width, H heads, K head width.
"""

import importlib.util
import math
import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imm_scale import rng
from imm_scale.errors import UserError
from imm_scale.models.fp32_linear import Fp32Linear

ATTENTIONS = ("sdpa", "xformers")
TIME_EMBEDDINGS = ("positional", "fourier")
_TIME_CHANNELS = 256
_MAX_PERIOD = 10000.0
_FOURIER_SCALE = 16.0


@cache
def xformers_works() -> bool:
    """Whether xformers' attention can run here: it needs CUDA and the package."""
    works = torch.cuda.is_available() and importlib.util.find_spec("xformers") is not None
    if not works:
        warnings.warn(
            "model.attention=xformers was asked for, but xformers needs a CUDA device and the [cuda] extra: "
            "using torch's scaled_dot_product_attention",
            stacklevel=2,
        )
    return works


def attend(q_NTHK: Tensor, k_NTHK: Tensor, v_NTHK: Tensor, attention: str = "sdpa") -> Tensor:
    """Softmax attention, (N, T, H, K) in and out. Raises UserError for an unknown `attention`."""
    if attention not in ATTENTIONS:
        raise UserError(f"model.attention={attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
    if attention == "xformers" and xformers_works():
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q_NTHK, k_NTHK, v_NTHK)
    q, k, v = (x.transpose(1, 2) for x in (q_NTHK, k_NTHK, v_NTHK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def keyed_dropout(x_NTD: Tensor, p: float, key_N: Tensor | None, stream: int) -> Tensor:
    """Dropout whose mask is a function of each sample's key and the layer: the same on any rank and when recomputed."""
    if key_N is None or p == 0.0:
        return x_NTD
    count = x_NTD[0].numel()
    keep = rng.uniform(0, "dropout_mask", key_N, count, stream) >= p
    return x_NTD * (keep.view_as(x_NTD).to(x_NTD.dtype) / (1.0 - p))


def modulate(x_NTD: Tensor, shift_ND: Tensor, scale_ND: Tensor) -> Tensor:
    return x_NTD * (1.0 + scale_ND[:, None]) + shift_ND[:, None]


class Attention(nn.Module):
    """Multi-head self-attention with an optional RMS norm of queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool, attention: str):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        head_width = width // heads
        self.q_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()

    def forward(self, x_NTD: Tensor) -> Tensor:
        n, t, d = x_NTD.shape
        q, k, v = self.qkv(x_NTD).view(n, t, 3, self.heads, d // self.heads).unbind(2)
        # The norms may answer in fp32 under autocast; attention wants one dtype.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.proj(attend(q, k, v, self.attention).reshape(n, t, d))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (Peebles and Xie, arXiv 2212.09748)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, dropout: float, attention: str):
        super().__init__()
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm, attention)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Fp32Linear(width, 6 * width))

    def forward(self, x_NTD: Tensor, condition_ND: Tensor, dropout_key_N: Tensor | None = None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition_ND).chunk(6, dim=1)
        attended = self.attn(modulate(self.norm1(x_NTD), shift_a, scale_a))
        attended = keyed_dropout(attended, self.dropout, dropout_key_N, stream=0)
        x_NTD = x_NTD + gate_a[:, None] * attended
        mixed = self.mlp(modulate(self.norm2(x_NTD), shift_m, scale_m))
        mixed = keyed_dropout(mixed, self.dropout, dropout_key_N, stream=1)
        return x_NTD + gate_m[:, None] * mixed


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch_size: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Fp32Linear(width, 2 * width))

    def forward(self, x_NTD: Tensor, condition_ND: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition_ND).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_NTD), shift, scale))


def time_frequencies(kind: str) -> Tensor:
    """(128,) fp64 angular frequencies: geometric from 1 to 1 / 10000, or 2 pi N(0, 16^2) drawn once for all nets."""
    half = _TIME_CHANNELS // 2
    if kind == "positional":
        return torch.exp(-math.log(_MAX_PERIOD) * torch.arange(half, dtype=torch.float64) / half)
    if kind == "fourier":
        return 2.0 * math.pi * _FOURIER_SCALE * rng.normal(0, "fourier", torch.arange(half), ()).double()
    raise UserError(f"time_embedding={kind!r} is unknown; choose one of {', '.join(TIME_EMBEDDINGS)}")


class TimeEmbedder(nn.Module):
    """A time as 128 cosines, then 128 sines, then a two-layer MLP, all in fp32 or better."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        self.kind = kind
        self.mlp = nn.Sequential(Fp32Linear(_TIME_CHANNELS, width), nn.SiLU(), Fp32Linear(width, width))

    def forward(self, c_noise_G: Tensor) -> Tensor:
        # The angles in fp64: rounding them is rounding t.
        angles = c_noise_G.double()[:, None] * time_frequencies(self.kind).to(c_noise_G.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


def position_table(width: int, rows: int, columns: int) -> Tensor:
    """(rows * columns, width) fixed sin-cos positions: the first half encodes the column, sin before cos."""
    quarter = width // 4
    frequencies = 1.0 / _MAX_PERIOD ** (torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(position: Tensor) -> Tensor:
        angles = position[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    return torch.cat([encode(column.flatten()), encode(row.flatten())], dim=1).float()
