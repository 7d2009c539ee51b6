"""What is asked of a head: a law of the tokens of a set S, given the net's state at each of their positions.

Legend: N samples, K positions with a state, D width, V vocabulary (without mask). `scored` says which positions are in
S: any, none too, and others in each sample. Tokens of S are ordered by position. In training it may number several sets
S_1, S_2, .. of a sample, which share the states and nothing else: int64 from 1 to K, 0 at positions in none.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imm_scale.models.heads.unembedding import Unembedding


class HeadOutput(NamedTuple):
    """What training reads of a head.

    Attributes:
        log_prob_N: (N,) log q(x^S | h) in nats, fp32 or better, with gradient; 0 where S is empty. Of several sets
            the sum, as of all that follows.
        teaching_N: (N,) a further loss, to be added to -log_prob_N; None where there is none.
        monitors: {name: (N,)} for the metrics, without gradient.
    """

    log_prob_N: Tensor
    teaching_N: Tensor | None = None
    monitors: Mapping[str, Tensor] = {}

    @property
    def nll(self) -> Tensor:
        """(N,) fp64 -log q, with what is learned beside it: of a head that draws by a student a bound of its own."""
        nll_N = -self.log_prob_N.double()
        return nll_N if self.teaching_N is None else nll_N + self.teaching_N.double()


class Prefix(NamedTuple):
    """The tokens of S moved to the first places, set after set: causal order then hides those of none by itself.

    Attributes:
        order_NK: for each place the position its token comes from.
        set_NK: int64, the set that holds the token at each place, 0 where none does.
        several: there may be more sets than one. What is asked of a law of one set passes a mask, and this is False.
    """

    order_NK: Tensor
    set_NK: Tensor
    several: bool

    @property
    def scored(self) -> Tensor:
        """(N, K) bool: which places hold tokens that are scored."""
        return self.set_NK > 0

    @property
    def starts(self) -> Tensor:
        """(N, K) int64: at which place the set of each place begins."""
        return positions(self.set_NK).masked_fill(~begins(self.set_NK), 0).cummax(dim=1).values

    @property
    def apart(self) -> Tensor | None:
        """(N, K) the sets that places are to be kept apart by; None where causal order does."""
        return self.set_NK if self.several else None

    @property
    def last(self) -> Tensor:
        """(N, K) bool: which places hold the last token of a set."""
        return self.scored & begins(self.set_NK.flip(1)).flip(1)

    def take(self, x: Tensor) -> Tensor:
        """(N, K, ...) by position to (N, K, ...) by place."""
        index = self.order_NK.view(*self.order_NK.shape, *[1] * (x.ndim - 2)).expand(x.shape)
        return x.gather(1, index)

    def scatter(self, x: Tensor) -> Tensor:
        """(N, K, ...) by place to (N, K, ...) by position."""
        return self._replace(order_NK=self.order_NK.argsort(dim=1)).take(x)

    def scatter_tokens(self, tokens: Sequence[Tensor]) -> Tensor:
        """int64 (N, K) by position from the tokens (N,) of the first places; 0 where not scored."""
        x_NK = torch.zeros_like(self.order_NK)
        for place, token_N in enumerate(tokens):
            x_NK[:, place] = token_N
        return self.scatter(x_NK.masked_fill(~self.scored, 0))


def prefix_of(scored_NK: Tensor) -> Prefix:
    """The prefix of a set (N, K) of bool, or of several that are numbered."""
    set_NK = scored_NK.long()
    order_NK = torch.where(scored_NK > 0, set_NK, scored_NK.shape[1] + 1).argsort(dim=1, stable=True)
    return Prefix(order_NK, set_NK.gather(1, order_NK), scored_NK.dtype != torch.bool)


def positions(like_NK: Tensor) -> Tensor:
    """(N, K) int64 0, 1, 2, ..: where tokens stand that have not been moved."""
    return torch.arange(like_NK.shape[1], device=like_NK.device).expand(like_NK.shape[:2])


def begins(set_NK: Tensor) -> Tensor:
    """(N, K) bool: at which places another set (N, K) is than at the place before."""
    return F.pad(set_NK[:, 1:] != set_NK[:, :-1], (1, 0), value=True)


def sums_of_runs(x: Tensor, start_NK: Tensor) -> Tensor:
    """(N, K, ...) by place to the same: at the first place of a run the sum over it, at others over what is left of it.

    By doubling: what atomic additions gather differs from one run of a program to the next.

    Args:
        start_NK: int64, where the run of each place begins.
    """
    step = 1
    while step < x.shape[1]:
        other_NK = (start_NK[:, step:] != start_NK[:, :-step]).view(len(x), -1, *[1] * (x.ndim - 2))
        x = torch.cat([x[:, :-step] + x[:, step:].masked_fill(other_NK, 0.0), x[:, -step:]], dim=1)
        step *= 2
    return x


def means_of_runs(x_NKD: Tensor, start_NK: Tensor) -> Tensor:
    """As `sums_of_runs`, the mean: (N, K, D)."""
    ones_NK1 = x_NKD.new_ones(()).expand(*x_NKD.shape[:2], 1)
    return sums_of_runs(x_NKD, start_NK) / sums_of_runs(ones_NK1, start_NK)


def masked_mean(x: Tensor, kept: Tensor) -> Tensor:
    """Mean over the last axis but one of those of (..., K, D) that are kept (..., K): (..., D), 0 of none."""
    total = x.masked_fill(~kept[..., None], 0.0).sum(dim=-2)
    return total / kept.sum(dim=-1, keepdim=True).clamp(min=1)


class Head(nn.Module, ABC):
    """A law q(x^S | h). Heads and their parts are called as modules: ZeRO-3 gathers weights by hooks on calls.

    Attributes:
        independent: tokens of S are drawn independently, so that each may be scored as a set of its own.
        takes_uniforms: it learns from noise: `forward` wants uniforms.
    """

    independent: bool = False
    takes_uniforms: bool = False

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.unembed = Unembedding(width, vocabulary)

    @abstractmethod
    def forward(self, h_NKD: Tensor, x_NK: Tensor, scored_NK: Tensor, uniform_NK: Tensor | None = None) -> HeadOutput:
        """Scores the tokens of S of each sample jointly, or those of each of its sets. Tokens elsewhere are not read.

        Args:
            h_NKD: a state for each position.
            x_NK: int64 tokens below the vocabulary wherever scored.
            scored_NK: bool, the set S; or int64 numbers of several sets.
            uniform_NK: fp64 in [0, 1), for heads that learn from noise; others ignore it.
        """

    def log_prob(self, h_NKD: Tensor, x_NK: Tensor, scored_NK: Tensor) -> Tensor:
        """(N,) log q(x^S | h) in nats."""
        return self(h_NKD, x_NK, scored_NK).log_prob_N

    @abstractmethod
    def sample(self, h_NKD: Tensor, scored_NK: Tensor, uniform_NK2: Tensor) -> Tensor:
        """A draw of x^S: int64 (N, K), 0 where not scored. A sample is a function of its own states and uniforms.

        Args:
            uniform_NK2: fp64 in [0, 1); of each pair the first is for the token, the second for latent variables.
        """

    @abstractmethod
    def begin(self, h_NKD: Tensor, scored_NK: Tensor) -> Any:
        """The state of a pass through S from left to right, of which nothing is known yet; (N, K, D) and (N, K)."""

    @abstractmethod
    def conditional(self, state: Any, j: int) -> Tensor:
        """(N, V) fp64 log q(x_j | h, the tokens of S observed so far) at position j, after the last observed one."""

    @abstractmethod
    def observe(self, state: Any, j: int, x_N: Tensor) -> Any:
        """The state once x_j (N,) is known; samples in which j is not scored keep theirs."""

    @abstractmethod
    def marginals(self, h_NKD: Tensor, scored_NK: Tensor | None = None) -> Tensor:
        """(N, K, V) log-probabilities of each token of S alone; S is everything where it is not given."""
