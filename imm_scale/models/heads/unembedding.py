"""From states to tokens: scores, draws and distribution functions over a vocabulary, a chunk of it at a time.

Logits are formed in the dtype of the weights, fp32 or better, whatever autocast does to others (products round to tf32
where precision=tf32 asks for it), and in training never for all states and all tokens at once.
Legend: M states, D width, V vocabulary, C its tokens in a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imm_scale.models.fp32_linear import without_autocast

CELLS = 1 << 24  # logits there are at once: 64 MiB of fp32
_ROWS = 1 << 14  # states they are of, so that a chunk of the vocabulary keeps matrix units busy


def pieces(rows: int, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    """Slices of states and of the vocabulary that cover all pairs, the vocabulary innermost."""
    height = max(1, min(rows, _ROWS))
    chunk = max(1, CELLS // height)
    for top in range(0, rows, height):
        for start in range(0, vocabulary, chunk):
            yield slice(top, min(top + height, rows)), slice(start, min(start + chunk, vocabulary))


def inverse_cdf(log_prob: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose distribution function exceeds the uniform: (..., V) and (...,) to int64 (...,).

    In fp64: with 24 bits of uniform, or of Gumbel noise, rare tokens are never drawn. Log-probabilities need not sum
    to 1.
    """
    cdf = log_prob.double().softmax(dim=-1).cumsum(dim=-1)
    # Below the last value for any uniform below 1, so that a token is always found, and never one of probability 0.
    return torch.searchsorted(cdf, uniform[..., None] * cdf[..., -1:], right=True)[..., 0]


def _within(x_M: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """Which tokens are in the chunk, and where (any place in it for the others)."""
    width = chunk.stop - chunk.start
    return (x_M >= chunk.start) & (x_M < chunk.stop), (x_M - chunk.start).clamp(0, width - 1)[:, None]


class _TokenLogProb(torch.autograd.Function):
    """log softmax(h W^T + b)[x], keeping of all logits only their normalizers; the backward pass forms them again."""

    @staticmethod
    def forward(ctx: Any, h_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, x_M: Tensor) -> Tensor:
        normalizer_M = h_MD.new_full((len(h_MD),), -torch.inf)
        picked_M = h_MD.new_zeros(len(h_MD))
        with without_autocast(h_MD):
            for rows, chunk in pieces(len(h_MD), len(weight_VD)):
                logits_MC = F.linear(h_MD[rows], weight_VD[chunk], bias_V[chunk])
                inside_M, place_M1 = _within(x_M[rows], chunk)
                picked_M[rows] += torch.where(inside_M, logits_MC.gather(1, place_M1)[:, 0], 0.0)
                normalizer_M[rows] = torch.logaddexp(normalizer_M[rows], logits_MC.logsumexp(dim=1))
        ctx.save_for_backward(h_MD, weight_VD, bias_V, x_M, normalizer_M)
        return picked_M - normalizer_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        h_MD, weight_VD, bias_V, x_M, normalizer_M = ctx.saved_tensors
        grad_h, grad_weight, grad_bias = (torch.zeros_like(part) for part in (h_MD, weight_VD, bias_V))
        with without_autocast(h_MD):
            for rows, chunk in pieces(len(h_MD), len(weight_VD)):
                logits_MC = F.linear(h_MD[rows], weight_VD[chunk], bias_V[chunk])
                grad_MC = logits_MC.sub_(normalizer_M[rows, None]).exp_().mul_(-grad_M[rows, None])
                inside_M, place_M1 = _within(x_M[rows], chunk)
                grad_MC.scatter_add_(1, place_M1, torch.where(inside_M, grad_M[rows], 0.0)[:, None])
                grad_h[rows] += grad_MC @ weight_VD[chunk]
                grad_weight[chunk] += grad_MC.t() @ h_MD[rows]
                grad_bias[chunk] += grad_MC.sum(0)
        return grad_h, grad_weight, grad_bias, None


class Unembedding(nn.Linear):
    """The linear map from a state to the logits of all tokens. The mask is none of them, so that it is never drawn."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__(width, vocabulary)
        nn.init.normal_(self.weight, std=0.5 * width**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, h: Tensor, x: Tensor | None = None, interval: bool = False) -> Any:
        """Log-probabilities in fp32 or better: of the tokens x (...,) at states (..., D), or of all, (..., V).

        With `interval` the pair F(x - 1) and p(x) in fp64, each (...,), without gradient: the uniforms for which `draw`
        answers x.
        """
        h = h.to(self.weight.dtype)
        if interval:
            assert x is not None
            return self._interval(h, x)
        if x is not None:
            return _TokenLogProb.apply(h.flatten(0, -2), self.weight, self.bias, x.flatten()).view(x.shape)
        with without_autocast(h):
            return F.linear(h, self.weight, self.bias).log_softmax(dim=-1)

    @torch.no_grad()
    def draw(self, h: Tensor, uniform: Tensor) -> Tensor:
        """A token of each state (..., D) by the inverse of its distribution function at a uniform (...,)."""
        rows = max(1, CELLS // self.out_features)
        states, uniforms = h.flatten(0, -2).split(rows), uniform.flatten().split(rows)
        drawn = [inverse_cdf(self(part), u) for part, u in zip(states, uniforms, strict=True)]
        return torch.cat(drawn).view(uniform.shape)

    @torch.no_grad()
    def _interval(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h_MD, x_M = h.flatten(0, -2), x.flatten()
        # log sums of exp(logit) over all tokens, those below x, and x itself
        sums_3M = torch.full((3, len(h_MD)), -torch.inf, dtype=torch.float64, device=h.device)
        with without_autocast(h_MD):
            for rows, chunk in pieces(len(h_MD), self.out_features):
                logits_MC = F.linear(h_MD[rows], self.weight[chunk], self.bias[chunk]).double()
                token_C = torch.arange(chunk.start, chunk.stop, device=h.device)
                for i, kept in enumerate((None, token_C < x_M[rows, None], token_C == x_M[rows, None])):
                    part_MC = logits_MC if kept is None else logits_MC.masked_fill(~kept, -torch.inf)
                    sums_3M[i, rows] = torch.logaddexp(sums_3M[i, rows], part_MC.logsumexp(dim=1))
        below_M, mass_M = (sums_3M[1:] - sums_3M[0]).exp()
        return below_M.view(x.shape), mass_M.view(x.shape)
