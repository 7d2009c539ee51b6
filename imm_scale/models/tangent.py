"""Derivatives of a net along a tangent of its inputs, written out layer by layer as ordinary tensors.

torch.func.jvp has no rule for fused attention, fails under recomputation and under ZeRO-3's autograd functions, and
multiplies every input by the zero tangent of a weight. Here no weight is read outside its layer, and every layer is a
plain call. Each function takes a value and its tangent, and returns both after the layer; the value is what the layer
alone would give, to the bit. The call for the tangent comes first: DeepSpeed takes a layer's last call for the one
that comes back in the backward pass.

Legend: N samples, T tokens, D width, H heads, K head width. Tangents are of the first samples of their values, n of N,
and otherwise of their shape.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TINY = 1e-30  # of a tangent that is 0 everywhere


def gradients(live: bool) -> AbstractContextManager[None]:
    """Where tangents are computed: with gradient if they are `live` and the values have one, else without."""
    return torch.set_grad_enabled(live and torch.is_grad_enabled())


def at_unit_size(linear: Callable[[Tensor], Tensor], tangent: Tensor) -> Tensor:
    """`linear(tangent)`, computed on samples of unit root mean square and scaled back.

    A derivative is linear in its tangent, so this changes nothing but rounding: in 16 bits a small tangent would drown
    beside a bias, and a large one overflow.
    """
    square = tangent.detach().float().square().flatten(1).mean(dim=1)
    scale = square.sqrt().clamp_min(_TINY).to(tangent.dtype)
    out = linear(tangent / _beside(scale, tangent)).to(tangent.dtype)
    return out * _beside(scale, out)


def _beside(scale_N: Tensor, x: Tensor) -> Tensor:
    return scale_N.view(-1, *[1] * (x.dim() - 1))


def affine_tangent(layer: nn.Module, tangent: Tensor, row_dims: int = 1) -> Tensor:
    """layer(tangent) - layer(0): what an affine layer does to a tangent, in one call of the layer.

    Args:
        layer: a linear layer or a convolution.
        row_dims: dimensions of one row of the layer's input, the last ones of `tangent` (N, ...).
    """

    def without_bias(unit: Tensor) -> Tensor:
        rows = unit.reshape(-1, *unit.shape[unit.dim() - row_dims :])
        out = layer(torch.cat([rows, torch.zeros_like(rows[:1])])).to(unit.dtype)
        return (out[:-1] - out[-1:]).view(*unit.shape[: unit.dim() - row_dims], *out.shape[1:])

    return at_unit_size(without_bias, tangent)


def affine(layer: nn.Module, x: Tensor, dx: Tensor, live: bool, row_dims: int = 1) -> tuple[Tensor, Tensor]:
    """An affine layer, see `affine_tangent`."""
    with gradients(live):
        dy = affine_tangent(layer, dx, row_dims)
    return layer(x), dy


def layer_norm(norm: nn.LayerNorm, x_NTD: Tensor, dx_NTD: Tensor, live: bool) -> tuple[Tensor, Tensor]:
    """A layer norm without weights."""
    with gradients(live):
        x = x_NTD[: len(dx_NTD)].to(dx_NTD.dtype)
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        scale = torch.rsqrt(variance + norm.eps)
        normed = (x - mean) * scale
        along = (normed * dx_NTD).mean(dim=-1, keepdim=True)
        dy = scale * (dx_NTD - dx_NTD.mean(dim=-1, keepdim=True) - normed * along)
    return norm(x_NTD), dy


def rms_norm_tangent(norm: nn.Module, x: Tensor, dx: Tensor) -> Tensor:
    """What an RMS norm over the last dimension does to a tangent; x and dx of one shape (..., K).

    Its weights are read by the norm itself: norm(u) times the root mean square of u is weight * u.
    """
    if isinstance(norm, nn.Identity):
        return dx
    assert isinstance(norm, nn.RMSNorm)
    x = x[: len(dx)]

    def root(of: Tensor, computed: torch.dtype) -> Tensor:
        eps = torch.finfo(computed).eps if norm.eps is None else norm.eps
        return (of.to(dx.dtype).square().mean(dim=-1, keepdim=True) + eps).sqrt()

    # Under autocast the norm may compute in fp32, as its answer tells, and its default eps is that of the dtype.
    computed = norm(x).dtype
    scale = 1.0 / root(x, computed)
    normed = x.to(dx.dtype) * scale
    along = scale * (dx - normed * (normed * dx).mean(dim=-1, keepdim=True))
    return norm(along.to(x.dtype)).to(dx.dtype) * root(along.to(x.dtype), computed)


def modulate(
    x_NTD: Tensor, dx_NTD: Tensor, scale_ND: Tensor, dscale_ND: Tensor, dshift_ND: Tensor, live: bool
) -> Tensor:
    """Tangent of x (1 + scale) + shift."""
    with gradients(live):
        n = len(dx_NTD)
        return dx_NTD * (1.0 + scale_ND[:n, None]) + x_NTD[:n] * dscale_ND[:, None] + dshift_ND[:, None]


def gate(y_NTD: Tensor, dy_NTD: Tensor, gate_ND: Tensor, dgate_ND: Tensor, live: bool) -> Tensor:
    """Tangent of gate y."""
    with gradients(live):
        n = len(dy_NTD)
        return gate_ND[:n, None] * dy_NTD + dgate_ND[:, None] * y_NTD[:n]


def gelu(x: Tensor, dx: Tensor, live: bool) -> tuple[Tensor, Tensor]:
    """GELU in its tanh form. An elementwise function's derivative is the same in either direction."""
    with gradients(live):
        dy = torch.ops.aten.gelu_backward(dx, x[: len(dx)].to(dx.dtype), approximate="tanh")
    return F.gelu(x, approximate="tanh"), dy


def silu(x: Tensor, dx: Tensor, live: bool) -> tuple[Tensor, Tensor]:
    """x sigmoid(x)."""
    with gradients(live):
        of = x[: len(dx)]
        sigmoid = torch.sigmoid(of)
        dy = dx * sigmoid * (1.0 + of * (1.0 - sigmoid))
    return F.silu(x), dy


def attention_tangent(qkv_N3HTK: Tensor, dqkv_N3HTK: Tensor) -> Tensor:
    """(N, H, T, K) tangent of softmax(q k^T / sqrt(K)) v; its T x T matrices live for one layer only."""
    q, k, v = qkv_N3HTK[: len(dqkv_N3HTK)].unbind(1)
    factor = 1.0 / math.sqrt(q.shape[-1])
    weights = torch.softmax((q @ k.mT).to(dqkv_N3HTK.dtype) * factor, dim=-1)

    def linear(unit_N3HTK: Tensor) -> Tensor:
        dq, dk, dv = unit_N3HTK.unbind(1)
        dscores = (dq @ k.mT + q @ dk.mT).to(unit_N3HTK.dtype) * factor
        dweights = weights * (dscores - (weights * dscores).sum(dim=-1, keepdim=True))
        return (dweights @ v.to(dweights.dtype)).to(unit_N3HTK.dtype) + (weights @ dv).to(unit_N3HTK.dtype)

    return at_unit_size(linear, dqkv_N3HTK)
