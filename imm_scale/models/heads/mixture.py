"""The mixture of products: all tokens of a group share one component, drawn from R.

It closes at most (k - 1) log R of what k tokens share.
Legend: N samples, K positions with a state, D width, V vocabulary, R components. What is said of a group stands at the
place of its first token.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imm_scale.models.heads.base import (
    Head,
    HeadOutput,
    Prefix,
    masked_mean,
    means_of_runs,
    positions,
    prefix_of,
    sums_of_runs,
)
from imm_scale.models.heads.components import ComponentStates, ComponentWeights, component_monitors
from imm_scale.models.heads.unembedding import inverse_cdf


@dataclass(frozen=True)
class _Pass:
    """Log weights of the components of each group given what was observed; where the group of each position begins."""

    h_NKD: Tensor
    scored_NK: Tensor
    start_NK: Tensor
    log_weight_NKR: Tensor


class MixtureHead(Head):
    """q(x^S | h) = prod over groups of sum_r w_r(pooled h) prod_i softmax(E phi(h_i, e_r))[x_i].

    Args:
        group: so many neighbouring tokens of S share a component; None: all do.
    """

    def __init__(self, width: int, vocabulary: int, components: int, group: int | None = None):
        super().__init__(width, vocabulary)
        self.group = group
        self.states = ComponentStates(width, components)
        self.weights = ComponentWeights(width, components)

    def _starts(self, prefix: Prefix) -> Tensor:
        """(N, K) int64: the place at which the group of each place begins."""
        place_NK, start_NK = positions(prefix.set_NK), prefix.starts
        return start_NK if self.group is None else place_NK - (place_NK - start_NK) % self.group

    def _log_weights(self, h_NKD: Tensor, start_NK: Tensor) -> Tensor:
        """(N, K, R) of states that are by place; elsewhere than at a group's first place they say nothing."""
        return self.weights(means_of_runs(h_NKD, start_NK))

    def forward(self, h_NKD: Tensor, x_NK: Tensor, scored_NK: Tensor, uniform_NK: Tensor | None = None) -> HeadOutput:
        prefix = prefix_of(scored_NK)
        h_NKD, start_NK = prefix.take(h_NKD), self._starts(prefix)
        log_weight_NKR, states_NKRD = self._log_weights(h_NKD, start_NK), self.states(h_NKD)
        x_NKR = prefix.take(x_NK).masked_fill(~prefix.scored, 0)[..., None].expand(states_NKRD.shape[:-1])
        token_NKR = self.unembed(states_NKRD, x_NKR)
        group_NK = (log_weight_NKR + sums_of_runs(token_NKR, start_NK)).logsumexp(dim=-1)
        there_NK = prefix.scored & (start_NK == positions(start_NK))
        monitors = component_monitors(masked_mean(log_weight_NKR.exp(), there_NK))
        return HeadOutput(group_NK.masked_fill(~there_NK, 0.0).sum(dim=1), None, monitors)

    @torch.no_grad()
    def sample(self, h_NKD: Tensor, scored_NK: Tensor, uniform_NK2: Tensor) -> Tensor:
        prefix = prefix_of(scored_NK)
        start_NK, latent_NK = self._starts(prefix), prefix.take(uniform_NK2[..., 1])  # of a group the first token's
        component_NK = inverse_cdf(self._log_weights(prefix.take(h_NKD), start_NK), latent_NK).gather(1, start_NK)
        states_NKD = self.states(h_NKD, prefix.scatter(component_NK))
        return self.unembed.draw(states_NKD, uniform_NK2[..., 0]).masked_fill(~scored_NK, 0)

    def begin(self, h_NKD: Tensor, scored_NK: Tensor) -> _Pass:
        prefix = prefix_of(scored_NK)
        start_NK = self._starts(prefix)
        log_weight_NKR = self._log_weights(prefix.take(h_NKD), start_NK).double()
        return _Pass(h_NKD, scored_NK, prefix.scatter(start_NK), log_weight_NKR)

    def _index(self, state: _Pass, j: int) -> Tensor:
        return state.start_NK[:, j, None, None].expand(-1, 1, state.log_weight_NKR.shape[2])

    def conditional(self, state: _Pass, j: int) -> Tensor:
        log_weight_NR = state.log_weight_NKR.gather(1, self._index(state, j))[:, 0].log_softmax(dim=1)
        token_NRV = self.unembed(self.states(state.h_NKD[:, j])).double()
        return (log_weight_NR[..., None] + token_NRV).logsumexp(dim=1).log_softmax(dim=-1)

    def observe(self, state: _Pass, j: int, x_N: Tensor) -> _Pass:
        """By Bayes: each component of the token's group gains what it gave the token."""
        states_NRD = self.states(state.h_NKD[:, j])
        x_NR = x_N.masked_fill(~state.scored_NK[:, j], 0)[:, None].expand(states_NRD.shape[:2])
        gain_NR = self.unembed(states_NRD, x_NR).double().masked_fill(~state.scored_NK[:, j, None], 0.0)
        log_weight_NKR = state.log_weight_NKR.scatter_add(1, self._index(state, j), gain_NR[:, None])
        return replace(state, log_weight_NKR=log_weight_NKR)

    def marginals(self, h_NKD: Tensor, scored_NK: Tensor | None = None) -> Tensor:
        scored_NK = h_NKD.new_ones(h_NKD.shape[:2], dtype=torch.bool) if scored_NK is None else scored_NK
        prefix = prefix_of(scored_NK)
        start_NK = self._starts(prefix)
        log_weight_NKR, start_NK = self._log_weights(prefix.take(h_NKD), start_NK), prefix.scatter(start_NK)
        total_NKV = torch.full((), -torch.inf, device=h_NKD.device)
        for r, log_weight_NK in enumerate(log_weight_NKR.unbind(dim=2)):  # one at a time: R times V is too much
            component_NK = torch.full_like(scored_NK, r, dtype=torch.int64)
            token_NKV = self.unembed(self.states(h_NKD, component_NK))
            total_NKV = torch.logaddexp(total_NKV, log_weight_NK.gather(1, start_NK)[..., None] + token_NKV)
        return total_NKV
