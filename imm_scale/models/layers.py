"""Parts of the transformer: attention, the adaLN-Zero block, embedders.

Legend: N samples, T tokens, D width, H heads, K head width.
"""

import importlib.util
import math
import warnings
from collections import OrderedDict
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imm_scale import rng
from imm_scale.errors import UserError
from imm_scale.models import tangent
from imm_scale.models.fp32_linear import Fp32Linear

ATTENTIONS = ("sdpa", "xformers")
TIME_EMBEDDINGS = ("positional", "fourier")
_TIME_CHANNELS = 256
_MAX_PERIOD = 10000.0
_FOURIER_SCALE = 16.0


@torch.compiler.assume_constant_result  # neither the search for a package nor a warning can be traced
def xformers_works(device_type: str = "cuda") -> bool:
    """Whether xformers' attention can run on such a device: it needs CUDA and the package. Warns once where not."""
    return _xformers_works(device_type)


@cache
def _xformers_works(device_type: str) -> bool:
    works = device_type == "cuda" and torch.cuda.is_available() and importlib.util.find_spec("xformers") is not None
    if not works and device_type != "meta":  # where only shapes are computed
        warnings.warn(
            "model.attention=xformers was asked for, but xformers needs a CUDA device and the [cuda] extra: "
            "using torch's scaled_dot_product_attention",
            stacklevel=4,
        )
    return works


def attend(q_NTHK: Tensor, k_NTHK: Tensor, v_NTHK: Tensor, attention: str = "sdpa") -> Tensor:
    """Softmax attention, (N, T, H, K) in and out. Raises UserError for an unknown `attention`."""
    if attention not in ATTENTIONS:
        raise UserError(f"model.attention={attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
    if attention == "xformers" and xformers_works(q_NTHK.device.type):
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q_NTHK, k_NTHK, v_NTHK)
    q, k, v = (x.transpose(1, 2) for x in (q_NTHK, k_NTHK, v_NTHK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def keyed_dropout(x_NTD: Tensor, p: float, key_N: Tensor | None, stream: int) -> Tensor:
    """Dropout whose mask is a function of each sample's key and the layer: the same on any rank and when recomputed.

    Of more keys than samples the first are theirs.
    """
    if key_N is None or p == 0.0:
        return x_NTD
    count = x_NTD[0].numel()
    keep = rng.uniform(0, "dropout_mask", key_N[: len(x_NTD)], count, stream) >= p
    return x_NTD * (keep.view_as(x_NTD).to(x_NTD.dtype) / (1.0 - p))


def modulate(x_NTD: Tensor, shift_ND: Tensor, scale_ND: Tensor) -> Tensor:
    """x (1 + scale) + shift; both may be (N, S, D), of S neighbouring parts of the tokens, all of one length."""
    if shift_ND.dim() == 3:
        parts = x_NTD.unflatten(1, (shift_ND.shape[1], -1))
        return (parts * (1.0 + scale_ND[:, :, None]) + shift_ND[:, :, None]).flatten(1, 2)
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

    def project(self, x_NTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, T, H, K)."""
        n, t, d = x_NTD.shape
        q, k, v = self.qkv(x_NTD).view(n, t, 3, self.heads, d // self.heads).unbind(2)
        # The norms may answer in fp32 under autocast; attention wants one dtype.
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def forward(self, x_NTD: Tensor) -> Tensor:
        return self.proj(attend(*self.project(x_NTD), self.attention).reshape(x_NTD.shape))

    def with_tangent(self, x_NTD: Tensor, dx_NTD: Tensor, live: bool) -> tuple[Tensor, Tensor]:
        """`forward` and its tangent; the scores are formed for the tangent, whatever kernel computes the value."""
        n, t, d = x_NTD.shape
        with tangent.gradients(live):
            dq, dk, dv = tangent.affine_tangent(self.qkv, dx_NTD).view(-1, t, 3, self.heads, d // self.heads).unbind(2)
        q, k, v = self.qkv(x_NTD).view(n, t, 3, self.heads, d // self.heads).unbind(2)
        with tangent.gradients(live):
            dq, dk = tangent.rms_norm_tangent(self.q_norm, q, dq), tangent.rms_norm_tangent(self.k_norm, k, dk)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        with tangent.gradients(live):
            qkv, dqkv = (torch.stack(parts, dim=1).transpose(2, 3) for parts in ((q, k, v), (dq, dk, dv)))
            dout = tangent.attention_tangent(qkv, dqkv).transpose(1, 2).reshape(-1, t, d)
            dout = tangent.affine_tangent(self.proj, dout)
        return self.proj(attend(q, k, v, self.attention).reshape(n, t, d)), dout


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) to the same."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

    def with_tangent(self, x: Tensor, dx: Tensor, live: bool) -> tuple[Tensor, Tensor]:
        """`forward` and its tangent."""
        hidden, dhidden = tangent.affine(self.fc1, x, dx, live)
        return tangent.affine(self.fc2, *tangent.gelu(hidden, dhidden, live), live)


def adaln_projection(width: int, parts: int, condition_width: int | None = None) -> nn.Sequential:
    """The projection under its name in DiT, where a SiLU comes before it: all blocks share that one, outside them."""
    return nn.Sequential(OrderedDict({"1": Fp32Linear(condition_width or width, parts * width)}))


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (Peebles and Xie, arXiv 2212.09748)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, dropout: float, attention: str):
        super().__init__()
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm, attention)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = adaln_projection(width, 6)

    def _branch(self, x_NTD: Tensor, modulation: Tensor, dropout_key_N: Tensor | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        attended = self.attn(modulate(self.norm1(x_NTD), shift_a, scale_a))
        attended = keyed_dropout(attended, self.dropout, dropout_key_N, stream=0)
        x_NTD = x_NTD + gate_a[:, None] * attended
        mixed = self.mlp(modulate(self.norm2(x_NTD), shift_m, scale_m))
        mixed = keyed_dropout(mixed, self.dropout, dropout_key_N, stream=1)
        return x_NTD + gate_m[:, None] * mixed

    def _with_tangent(
        self,
        x_NTD: Tensor,
        dx_NTD: Tensor,
        condition_ND: Tensor,
        dcondition_ND: Tensor,
        dropout_key_N: Tensor | None,
        live: bool,
    ) -> tuple[Tensor, Tensor]:
        """`_branch` and its tangent, half by half."""
        modulation, dmodulation = tangent.affine(self.adaLN_modulation[0], condition_ND, dcondition_ND, live)
        halves: tuple[tuple[nn.LayerNorm, Attention | Mlp], ...] = ((self.norm1, self.attn), (self.norm2, self.mlp))
        modulations = zip(modulation.chunk(2, dim=1), dmodulation.chunk(2, dim=1), strict=True)
        for stream, ((norm, inner), parts) in enumerate(zip(halves, modulations, strict=True)):
            (shift, scale, gate), (dshift, dscale, dgate) = (part.chunk(3, dim=1) for part in parts)
            y, dy = tangent.layer_norm(norm, x_NTD, dx_NTD, live)
            dy = tangent.modulate(y, dy, scale, dscale, dshift, live)
            y, dy = inner.with_tangent(modulate(y, shift, scale), dy, live)
            y, dy = (keyed_dropout(part, self.dropout, dropout_key_N, stream) for part in (y, dy))
            dx_NTD = dx_NTD + tangent.gate(y, dy, gate, dgate, live)
            x_NTD = x_NTD + gate[:, None] * y
        return x_NTD, dx_NTD

    def forward(
        self,
        x_NTD: Tensor,
        condition_ND: Tensor,
        dropout_key_N: Tensor | None = None,
        still_NTD: Tensor | None = None,
        still_condition_ND: Tensor | None = None,
        dx_NTD: Tensor | None = None,
        dcondition_ND: Tensor | None = None,
        live: bool = False,
    ) -> Any:
        """(N, T, D). With `still_NTD` and its condition, a branch without gradient, the pair of both.

        Compiled together, the two branches share what depends on weights alone (their casts to 16 bits) and the masks.
        The branch without gradient goes first: see `DiT.pair`. With tangents of x and the condition, the pair of
        (N, T, D) and its tangent, which carries a gradient where it is `live`.
        """
        if dx_NTD is not None and dcondition_ND is not None:
            return self._with_tangent(x_NTD, dx_NTD, condition_ND, dcondition_ND, dropout_key_N, live)
        if still_NTD is None:
            return self._branch(x_NTD, self.adaLN_modulation(condition_ND), dropout_key_N)
        modulation, still_modulation = self.adaLN_modulation[0](condition_ND, still_condition_ND)
        with torch.no_grad():
            still_NTD = self._branch(still_NTD, still_modulation, dropout_key_N)
        return self._branch(x_NTD, modulation, dropout_key_N), still_NTD


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch_size: int, channels: int, condition_width: int | None = None):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.adaLN_modulation = adaln_projection(width, 2, condition_width)

    def forward(
        self,
        x_NTD: Tensor,
        condition_ND: Tensor,
        dx_NTD: Tensor | None = None,
        dcondition_ND: Tensor | None = None,
        live: bool = False,
    ) -> Any:
        """(N, T, values of a patch); with tangents of both the pair of that and its tangent.

        The condition may be (N, S, D), as in `modulate`.
        """
        if dx_NTD is not None and dcondition_ND is not None:
            return self._with_tangent(x_NTD, dx_NTD, condition_ND, dcondition_ND, live)
        rows = condition_ND.flatten(0, -2)  # fp32 products are of rows
        shift, scale = self.adaLN_modulation(rows).unflatten(0, condition_ND.shape[:-1]).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x_NTD), shift, scale))

    def _with_tangent(
        self, x_NTD: Tensor, dx_NTD: Tensor, condition_ND: Tensor, dcondition_ND: Tensor, live: bool
    ) -> tuple[Tensor, Tensor]:
        modulation = tangent.affine(self.adaLN_modulation[0], condition_ND, dcondition_ND, live)
        (shift, scale), (dshift, dscale) = (part.chunk(2, dim=1) for part in modulation)
        y, dy = tangent.layer_norm(self.norm_final, x_NTD, dx_NTD, live)
        dy = tangent.modulate(y, dy, scale, dscale, dshift, live)
        return tangent.affine(self.linear, modulate(y, shift, scale), dy, live)


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

    frequency_bits: Tensor

    def __init__(self, width: int, kind: str, numbers: int = 1):
        super().__init__()
        # fp64 as its bits: casts of a module (.half(), .to(torch.bfloat16)) leave integers alone.
        self.register_buffer("frequency_bits", time_frequencies(kind).view(torch.int64), persistent=False)
        self.mlp = nn.Sequential(Fp32Linear(numbers * _TIME_CHANNELS, width), nn.SiLU(), Fp32Linear(width, width))

    def forward(self, c_noise_G: Tensor) -> Tensor:
        # The angles in fp64: rounding them is rounding t.
        angles = c_noise_G.double()[:, None] * self.frequency_bits.view(torch.float64)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))

    def with_tangent(self, c_noise_G: Tensor, dc_noise_G: Tensor, live: bool) -> tuple[Tensor, Tensor]:
        """`forward` (G, D) and the tangent of its first groups."""
        frequencies, g = self.frequency_bits.view(torch.float64), len(dc_noise_G)
        angles, dangles = c_noise_G.double()[:, None] * frequencies, dc_noise_G.double()[:, None] * frequencies
        cosine, sine = angles.cos(), angles.sin()
        dwaves = torch.cat([-sine[:g] * dangles, cosine[:g] * dangles], dim=1)
        hidden, dhidden = tangent.affine(self.mlp[0], torch.cat([cosine, sine], dim=1), dwaves, live)
        return tangent.affine(self.mlp[2], *tangent.silu(hidden, dhidden.to(hidden.dtype), live), live)


class GuidanceEmbedder(TimeEmbedder):
    """Three numbers of a group, each as 128 cosines and 128 sines, then a two-layer MLP that answers 0 at first."""

    def __init__(self, width: int, kind: str):
        super().__init__(width, kind, numbers=3)
        for layer, std in ((self.mlp[0], 0.02), (self.mlp[2], 0.0)):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, guidance_G3: Tensor) -> Tensor:
        angles = guidance_G3.double()[:, :, None] * self.frequency_bits.view(torch.float64)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=2).flatten(1))


def position_table(width: int, rows: int, columns: int) -> Tensor:
    """(rows * columns, width) fixed sin-cos positions: the first half encodes the column, sin before cos."""
    quarter = width // 4
    frequencies = 1.0 / _MAX_PERIOD ** (torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(position: Tensor) -> Tensor:
        angles = position[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    return torch.cat([encode(column.flatten()), encode(row.flatten())], dim=1).float()
