"""The linear layer of the conditioning: fp32 under autocast, in both passes, and an input that TF32 does not round.

Legend: N rows, I inputs, O outputs.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TF32_DROPPED_BITS = 13  # of the 23 of a mantissa


def rounds_to_tf32(x: Tensor) -> bool:
    """Whether matrix units read ten bits only of the mantissa of x (any shape): constant wherever this is compiled."""
    return x.device.type == "cuda" and x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32


def tf32_part(x: Tensor) -> Tensor:
    """The value of ten mantissa bits nearest to x, of its shape, in fp32; what remains, x - tf32_part(x), is exact."""
    half_a_step, mask = 1 << (_TF32_DROPPED_BITS - 1), -(1 << _TF32_DROPPED_BITS)
    return ((x.view(torch.int32) + half_a_step) & mask).view(torch.float32)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast for the products of x (any shape); the meta device, which only counts, has none."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def split_product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """x W^T + b on matrix units that round to TF32, with x to 22 bits and W to 11, alike for all rows.

    x = high + rest, where high is not rounded again and rest, 2^-11 |x| at most, by 2^-11 of itself (2^-10 where the
    units cut off). Both are rows of one product, so that W is read once.
    """
    high = tf32_part(x_NI)
    of_high, of_rest = F.linear(torch.cat([high, x_NI - high]), weight_OI).chunk(2)
    return of_high + of_rest + bias_O


def _product(rows_NI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    with without_autocast(rows_NI):
        return (split_product if rounds_to_tf32(rows_NI) else F.linear)(rows_NI, weight_OI, bias_O)


class _Product(torch.autograd.Function):
    """x W^T + b for rows with gradient and, in the same product, for rows without.

    Its backward pass multiplies the rows with gradient only, and says itself that it wants no autocast: compiled, the
    backward pass of a stock linear layer is traced under the autocast of the forward pass and would run in 16 bits.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, still_NI: Tensor | None, weight_OI: Tensor, bias_O: Tensor) -> Any:
        ctx.save_for_backward(x_NI, weight_OI)
        if still_NI is None:
            return _product(x_NI, weight_OI, bias_O)
        out = _product(torch.cat([x_NI, still_NI]), weight_OI, bias_O)
        out_NO, still_NO = out.split([x_NI.shape[0], still_NI.shape[0]])
        ctx.mark_non_differentiable(still_NO)
        ctx.set_materialize_grads(False)
        return out_NO, still_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI = ctx.saved_tensors
        wants_x, _, wants_weight, wants_bias = ctx.needs_input_grad
        with without_autocast(grad_NO):
            grad_x = grad_NO @ weight_OI if wants_x else None
            grad_weight = grad_NO.t() @ x_NI if wants_weight else None
        return grad_x, None, grad_weight, grad_NO.sum(0) if wants_bias else None


class Fp32Linear(nn.Linear):
    """A linear layer in fp32, whatever autocast and TF32 do to others.

    Conditioning goes through these: with inputs of 16 bits, or of TF32's 19, the embeddings of t and r(s, t) would be
    equal or their difference wrong. Weights may be rounded: alike for t and r, they only scale the difference.
    """

    def forward(self, x_NI: Tensor, still_NI: Tensor | None = None) -> Any:
        """(N, O); with `still_NI`, rows that no gradient flows to, the pair of both products."""
        dtype = self.weight.dtype
        if still_NI is None and not torch.is_grad_enabled():  # plain operations, through which forward mode passes
            return _product(x_NI.to(dtype), self.weight, self.bias)
        still_NI = None if still_NI is None else still_NI.to(dtype)
        return _Product.apply(x_NI.to(dtype), still_NI, self.weight, self.bias)
