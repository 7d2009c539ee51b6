"""What a causal model says of blocks: its left-to-right profile, and what k tokens drawn independently lose.

A head that draws the k tokens after a prefix c independently has, at best, the marginals p(x_j | c). Token j of a block
then loses

    d_j = E[ log p(x_j | c, x_{<j}) - log p(x_j | c) ],

which is I(x_j; x_{<j} | c) where the data has the model's law. The first term is a pass; the marginal is a mean of the
model's own conditionals over continuations z of the prefix, which m rollouts z_1..z_m stand for:

    upper: p(x_j | c) ~ (1/m) sum_r p(x_j | c, z_r)
    lower: the same with the true x_{<j} as one more rollout, divided by m + 1.

By Jensen's inequality E -log of the upper one's mean is too large, for data of any law. Of data with the model's law
the true tokens are a rollout that fits x_j, and the lower one is too small, at most log(m + 1) (the bounds of Poole et
al., arXiv 1905.06922, for a known conditional). Both close as m grows; there is no unbiased estimate of a logarithm of
a mean, and the exact sum over continuations has V^(j-1) terms. Of random orders a causal model has no conditionals.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imm_scale import rng
from imm_scale.errors import UserError
from imm_scale.evaluation.tokens import estimates
from imm_scale.evaluation.tokens.estimates import Estimate
from imm_scale.evaluation.tokens.parts import Parts
from imm_scale.models.heads.unembedding import inverse_cdf

PREFIXES = 8  # lengths of prefix, from short to all but a block


class CausalScorer(Protocol):
    """What is asked of a causal model."""

    @property
    def first(self) -> int:
        """The first token it has a probability for: 0 where something stands before every sequence, else 1."""

    def token_scores(self, x_NT: Tensor) -> Tensor:
        """(N, T) -log p(x_n | x_{<n}) of (N, T) tokens, in nats; 0 before `first`."""

    def next_log_probs(self, x_NT: Tensor) -> Tensor:
        """(N, V) log p of the token after (N, T) tokens; T is `first` at least."""


@dataclass(frozen=True)
class LeftToRight:
    """The profile of the one order there is.

    Attributes:
        first: the first position that was scored.
        score_NT: (N, T - first) -log p of every token given all before it.
    """

    first: int
    score_NT: Tensor

    def at(self, first: int, stop: int) -> Estimate:
        """Mean over positions first to stop, in nats a token."""
        return estimates.mean(self.score_NT[:, first - self.first : stop - self.first].mean(dim=1))

    @property
    def nll(self) -> Estimate:
        """Nats a token."""
        return estimates.mean(self.score_NT.mean(dim=1))


def left_to_right(scorer: CausalScorer, x_NT: Tensor, parts: Parts) -> LeftToRight:
    """The scores of (N, T) held-out tokens. Raises UserError where one is not finite."""

    def rows(start: int, stop: int) -> NDArray[np.float64]:
        return _finite(scorer.token_scores(x_NT[start:stop])[:, scorer.first :].double().cpu()).numpy()

    return LeftToRight(scorer.first, torch.from_numpy(parts.collect("causal", rows, len(x_NT))))


def _finite(score: Tensor) -> Tensor:
    if not torch.isfinite(score).all():
        raise UserError(
            "-log p of a held-out token is not finite: the model gives it no probability, or its logits are not "
            "finite; check its weights and the vocabulary"
        )
    return score


@dataclass(frozen=True)
class BlockLoss:
    """What k tokens drawn independently lose, in nats a block; see the module about the two bounds."""

    block: int
    lower: Estimate
    upper: Estimate


def prefix_lengths(length: int, block: int, first: int) -> list[int]:
    """Up to 8 lengths of prefix, evenly from the shortest to the longest that leaves a block. Raises UserError."""
    if not 2 <= block <= length - first:
        raise UserError(f"--block {block}: of sequences of {length} tokens give 2 to {length - first}")
    return sorted({round(n) for n in np.linspace(first, length - block, PREFIXES)})


@dataclass(frozen=True)
class Rollouts:
    """How blocks are estimated: `count` continuations of each of `contexts` prefixes, for blocks of up to `block`."""

    block: int
    contexts: int
    count: int
    seed: int


def block_losses(scorer: CausalScorer, x_NT: Tensor, plan: Rollouts, parts: Parts) -> list[BlockLoss]:
    """Losses of blocks of 1, 2, .., `plan.block` tokens after prefixes of (N, T) held-out tokens.

    Every prefix is of another sample, so that errors are those of independent values.

    Raises:
        UserError: a block that is too long, or fewer samples than prefixes.
    """
    if not 2 <= plan.contexts <= len(x_NT):
        raise UserError(f"--contexts {plan.contexts}: give 2 to {len(x_NT)}, a prefix of each sample at most")
    lengths = prefix_lengths(x_NT.shape[1], plan.block, scorer.first)
    length_C = np.arange(plan.contexts) * len(lengths) // plan.contexts
    sample_C = rng.random_bits(plan.seed, "contexts", torch.arange(len(x_NT))).argsort()[: plan.contexts]

    def rows(start: int, stop: int) -> NDArray[np.float64]:
        values = []
        for index in np.unique(length_C[start:stop]):
            here_R = torch.from_numpy(start + np.flatnonzero(length_C[start:stop] == index))
            x_RT = x_NT[sample_C[here_R], : lengths[index] + plan.block]
            values.append(_bounds(scorer, x_RT, lengths[index], here_R, plan))
        return torch.cat(values).numpy()

    bounds_CB2 = torch.from_numpy(parts.collect("blocks", rows, plan.contexts)).cumsum(dim=1)
    lower_upper = [[estimates.mean(column) for column in bounds_C2.unbind(dim=1)] for bounds_C2 in bounds_CB2.unbind(1)]
    return [BlockLoss(k + 1, *pair) for k, pair in enumerate(lower_upper)]


def _bounds(scorer: CausalScorer, x_RT: Tensor, known: int, ordinal_R: Tensor, plan: Rollouts) -> Tensor:
    """(R, block, 2) lower and upper d_j of the tokens after the first `known` ones; the first loses nothing."""
    score_RB = scorer.token_scores(x_RT)[:, known:].double().cpu()
    log_BRM = torch.stack(_rolled_out(scorer, x_RT, known, ordinal_R, plan))
    total_RB = log_BRM.logsumexp(dim=2).T
    upper_RB = math.log(plan.count) - total_RB - score_RB
    lower_RB = math.log(plan.count + 1) - torch.logaddexp(total_RB, -score_RB) - score_RB
    bounds_RB2 = torch.stack([lower_RB, upper_RB], dim=2)
    bounds_RB2[:, 0] = 0.0
    return -_finite(-bounds_RB2)


def _rolled_out(scorer: CausalScorer, x_RT: Tensor, known: int, ordinal_R: Tensor, plan: Rollouts) -> list[Tensor]:
    """For each token of the block, (R, M) log p of the true one after each rollout's tokens before it."""
    rows, vocabulary_of = len(x_RT), scorer.next_log_probs
    uniform_RMB = rng.uniform(plan.seed, "rollouts", ordinal_R, plan.count * plan.block).view(rows, plan.count, -1)
    log_RMV = vocabulary_of(x_RT[:, :known])[:, None].expand(-1, plan.count, -1)  # one pass: the prefix is theirs all
    prefix_ST = x_RT[:, :known].repeat_interleave(plan.count, dim=0)
    logs = []
    for j in range(plan.block):
        log_RMV = vocabulary_of(prefix_ST).view(rows, plan.count, -1) if j else log_RMV
        logs.append(log_RMV[torch.arange(rows), :, x_RT[:, known + j]].double().cpu())
        drawn_RM = inverse_cdf(log_RMV, uniform_RMB[..., j].to(log_RMV.device)).cpu()
        prefix_ST = torch.cat([prefix_ST, drawn_RM.view(-1, 1)], dim=1)
    return logs
