"""The mixture of products: all tokens of a group share one component, drawn from R.

It closes at most (k - 1) log R of what k tokens share.
Legend: N samples, K positions with a state, D width, V vocabulary, R components, G groups of S tokens in a row.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from imm_scale.models.heads.base import Head, HeadOutput, Prefix, masked_mean, prefix_of
from imm_scale.models.heads.components import ComponentStates, ComponentWeights, component_monitors
from imm_scale.models.heads.unembedding import inverse_cdf


@dataclass(frozen=True)
class _Pass:
    """Log weights of the components of each group given what was observed, and the group of each position."""

    h_NKD: Tensor
    scored_NK: Tensor
    group_NK: Tensor
    log_weight_NGR: Tensor


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

    def _grouped(self, x: Tensor) -> Tensor:
        """(N, K, ...) by place to (N, G, S, ...), with zeros where the last group is short."""
        size = min(self.group or x.shape[1], x.shape[1])
        missing = -x.shape[1] % size
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)).unflatten(1, (-1, size))

    def _log_weights(self, h_NKD: Tensor, prefix: Prefix) -> Tensor:
        """(N, G, R)."""
        return self.weights(masked_mean(self._grouped(prefix.take(h_NKD)), self._grouped(prefix.scored_NK)))

    def _groups(self, scored_NK: Tensor) -> Tensor:
        """The group of each scored position; another one, that is there, at the others."""
        rank_NK = (scored_NK.cumsum(dim=1) - 1).clamp(min=0)
        return rank_NK // min(self.group or scored_NK.shape[1], scored_NK.shape[1])

    def forward(self, h_NKD: Tensor, x_NK: Tensor, scored_NK: Tensor, uniform_NK: Tensor | None = None) -> HeadOutput:
        prefix = prefix_of(scored_NK)
        log_weight_NGR = self._log_weights(h_NKD, prefix)
        states_NKRD = self.states(prefix.take(h_NKD))
        x_NKR = prefix.take(x_NK).masked_fill(~prefix.scored_NK, 0)[..., None].expand(states_NKRD.shape[:-1])
        token_NKR = self.unembed(states_NKRD, x_NKR).masked_fill(~prefix.scored_NK[..., None], 0.0)
        group_NG = (log_weight_NGR + self._grouped(token_NKR).sum(dim=2)).logsumexp(dim=-1)
        there_NG = self._grouped(prefix.scored_NK).any(dim=2)
        monitors = component_monitors(masked_mean(log_weight_NGR.exp(), there_NG))
        return HeadOutput(group_NG.masked_fill(~there_NG, 0.0).sum(dim=1), None, monitors)

    @torch.no_grad()
    def sample(self, h_NKD: Tensor, scored_NK: Tensor, uniform_NK2: Tensor) -> Tensor:
        prefix = prefix_of(scored_NK)
        latent_NG = self._grouped(prefix.take(uniform_NK2[..., 1]))[:, :, 0]  # of a group the first token's
        component_NG = inverse_cdf(self._log_weights(h_NKD, prefix), latent_NG)
        states_NKD = self.states(h_NKD, component_NG.gather(1, self._groups(scored_NK)))
        return self.unembed.draw(states_NKD, uniform_NK2[..., 0]).masked_fill(~scored_NK, 0)

    def begin(self, h_NKD: Tensor, scored_NK: Tensor) -> _Pass:
        log_weight_NGR = self._log_weights(h_NKD, prefix_of(scored_NK)).double()
        return _Pass(h_NKD, scored_NK, self._groups(scored_NK), log_weight_NGR)

    def _index(self, state: _Pass, j: int) -> Tensor:
        return state.group_NK[:, j, None, None].expand(-1, 1, state.log_weight_NGR.shape[2])

    def conditional(self, state: _Pass, j: int) -> Tensor:
        log_weight_NR = state.log_weight_NGR.gather(1, self._index(state, j))[:, 0].log_softmax(dim=1)
        token_NRV = self.unembed(self.states(state.h_NKD[:, j])).double()
        return (log_weight_NR[..., None] + token_NRV).logsumexp(dim=1).log_softmax(dim=-1)

    def observe(self, state: _Pass, j: int, x_N: Tensor) -> _Pass:
        """By Bayes: each component of the token's group gains what it gave the token."""
        states_NRD = self.states(state.h_NKD[:, j])
        x_NR = x_N.masked_fill(~state.scored_NK[:, j], 0)[:, None].expand(states_NRD.shape[:2])
        gain_NR = self.unembed(states_NRD, x_NR).double().masked_fill(~state.scored_NK[:, j, None], 0.0)
        log_weight_NGR = state.log_weight_NGR.scatter_add(1, self._index(state, j), gain_NR[:, None])
        return replace(state, log_weight_NGR=log_weight_NGR)

    def marginals(self, h_NKD: Tensor, scored_NK: Tensor | None = None) -> Tensor:
        scored_NK = h_NKD.new_ones(h_NKD.shape[:2], dtype=torch.bool) if scored_NK is None else scored_NK
        log_weight_NGR = self._log_weights(h_NKD, prefix_of(scored_NK))
        group_NK1 = self._groups(scored_NK)[..., None]
        total_NKV = torch.full((), -torch.inf, device=h_NKD.device)
        for r, log_weight_NG in enumerate(log_weight_NGR.unbind(dim=2)):  # one at a time: R times V is too much
            component_NK = torch.full_like(scored_NK, r, dtype=torch.int64)
            token_NKV = self.unembed(self.states(h_NKD, component_NK))
            total_NKV = torch.logaddexp(total_NKV, log_weight_NG[..., None].gather(1, group_NK1) + token_NKV)
        return total_NKV
