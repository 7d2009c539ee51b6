"""The hidden chain: R states walk along the tokens of S; each token comes from one, and decides with it where to go.

A state emits its token before the chain moves on, and the move may depend on that token (edges emit, in the language
of automata). With moves that ignore tokens this is the usual hidden Markov model; parity would then take R = 4 for a
token and the parity so far, where here the parity is enough, R = 2. A state never left is a component of a mixture.
Legend: N samples, K positions with a state, D width, V vocabulary, R hidden states, P the one before.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from imm_scale.models.fp32_linear import Fp32Linear
from imm_scale.models.heads import unembedding
from imm_scale.models.heads.base import Head, HeadOutput, Prefix, begins, masked_mean, means_of_runs, prefix_of
from imm_scale.models.heads.components import ComponentStates, ComponentWeights, component_monitors
from imm_scale.models.heads.unembedding import inverse_cdf

_STAY = 2.0  # log-odds at the start: near a mixture, where what a token says of the others reaches all of them


class Moves(nn.Module):
    """log T(z_i | z_{i-1}, x_{i-1}, h_i): a linear map of h_i and a table of the token before, which starts at 0."""

    def __init__(self, width: int, vocabulary: int, components: int):
        super().__init__()
        self.components = components
        self.linear = Fp32Linear(width, components**2)
        self.table = nn.Embedding(vocabulary, components**2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.table.weight)
        with torch.no_grad():
            self.linear.bias.copy_(_STAY * torch.eye(components).flatten())

    def forward(self, h: Tensor, token: Tensor) -> Tensor:
        """(..., P, R) for states (..., D) and the tokens before them (...,), of shapes that may broadcast."""
        logits = self.linear(h.flatten(0, -2)).unflatten(0, h.shape[:-1]) + self.table(token)
        return logits.unflatten(-1, (self.components, self.components)).log_softmax(dim=-1)


@dataclass(frozen=True)
class _Pass:
    """log q(z at the last observed token | tokens observed), at first log w; that token; and whether there is one."""

    h_NKD: Tensor
    scored_NK: Tensor
    log_filter_NR: Tensor
    token_N: Tensor
    started_N: Tensor


class ChainHead(Head):
    """q(x^S | h) = sum over z of w(z_1 | pooled h) prod_i q(x_i | h_i, z_i) T(z_{i+1} | z_i, x_i, h_{i+1}).

    Each q is softmax(E phi(h_i, e_z)), and the sum over paths is taken by the forward algorithm, in log space. It is
    a loop over the K places.
    """

    def __init__(self, width: int, vocabulary: int, components: int):
        super().__init__(width, vocabulary)
        self.states = ComponentStates(width, components)
        self.weights = ComponentWeights(width, components)
        self.moves = Moves(width, vocabulary, components)

    def _log_starts(self, h_NKD: Tensor, prefix: Prefix) -> Tensor:
        """log w (N, K, R) of states that are by place, said at the first place of each set."""
        return self.weights(means_of_runs(h_NKD, prefix.starts))

    def _emissions(self, h: Tensor, x: Tensor) -> Tensor:
        """log q of the tokens (...,) in each hidden state, (..., R)."""
        states = self.states(h)
        return self.unembed(states, x[..., None].expand(states.shape[:-1]))

    def _filters(self, h_NKD: Tensor, x_NK: Tensor, prefix: Prefix) -> Tensor:
        """log q(x_1 .. x_i, z_i), (N, K, R), for every place i of a prefix; a set begins anew."""
        emission_NKR, starts_NK = self._emissions(h_NKD, x_NK), begins(prefix.set_NK)
        begun_NKR = self._log_starts(h_NKD, prefix) + emission_NKR
        filters = [begun_NKR[:, 0]]
        for i, move_NPR in enumerate(self.moves(h_NKD[:, 1:], x_NK[:, :-1]).unbind(dim=1), start=1):
            moved_NR = (filters[-1][:, :, None] + move_NPR).logsumexp(dim=1) + emission_NKR[:, i]
            filters.append(torch.where(starts_NK[:, i, None], begun_NKR[:, i], moved_NR))
        return torch.stack(filters, dim=1)

    def forward(self, h_NKD: Tensor, x_NK: Tensor, scored_NK: Tensor, uniform_NK: Tensor | None = None) -> HeadOutput:
        prefix = prefix_of(scored_NK)
        x_NK = prefix.take(x_NK).masked_fill(~prefix.scored, 0)
        log_NKR = self._filters(prefix.take(h_NKD), x_NK, prefix)
        log_prob_N = log_NKR.logsumexp(dim=2).masked_fill(~prefix.last, 0.0).sum(dim=1)
        # How often each hidden state is taken, as the tokens so far tell
        occupancy_NKR = log_NKR.detach().softmax(dim=-1)
        return HeadOutput(log_prob_N, None, component_monitors(masked_mean(occupancy_NKR, prefix.scored)))

    @torch.no_grad()
    def sample(self, h_NKD: Tensor, scored_NK: Tensor, uniform_NK2: Tensor) -> Tensor:
        prefix = prefix_of(scored_NK)
        h_NKD, uniform_NK2 = prefix.take(h_NKD), prefix.take(uniform_NK2)
        log_NR, tokens = self._log_starts(h_NKD, prefix)[:, 0], []
        for i in range(int(scored_NK.sum(dim=1).max())):
            z_N = inverse_cdf(log_NR, uniform_NK2[:, i, 1])
            tokens.append(self.unembed.draw(self.states(h_NKD[:, i], z_N), uniform_NK2[:, i, 0]))
            if i + 1 < h_NKD.shape[1]:
                move_NPR = self.moves(h_NKD[:, i + 1], tokens[-1])
                log_NR = move_NPR.take_along_dim(z_N[:, None, None], dim=1)[:, 0]
        return prefix.scatter_tokens(tokens)

    def begin(self, h_NKD: Tensor, scored_NK: Tensor) -> _Pass:
        prefix = prefix_of(scored_NK)
        log_start_NR = self._log_starts(prefix.take(h_NKD), prefix)[:, 0].double()
        nothing_N = torch.zeros(len(h_NKD), dtype=torch.int64, device=h_NKD.device)
        return _Pass(h_NKD, scored_NK, log_start_NR, nothing_N, nothing_N.bool())

    def _arrived(self, state: _Pass, j: int) -> Tensor:
        """(N, R) log q(z_j | the tokens observed)."""
        move_NPR = self.moves(state.h_NKD[:, j], state.token_N).double()
        moved_NR = (state.log_filter_NR[:, :, None] + move_NPR).logsumexp(dim=1)
        return torch.where(state.started_N[:, None], moved_NR, state.log_filter_NR)

    def conditional(self, state: _Pass, j: int) -> Tensor:
        token_NRV = self.unembed(self.states(state.h_NKD[:, j])).double()
        return (self._arrived(state, j)[..., None] + token_NRV).logsumexp(dim=1).log_softmax(dim=-1)

    def observe(self, state: _Pass, j: int, x_N: Tensor) -> _Pass:
        """By Bayes: each hidden state in proportion to what it gave the token."""
        scored_N = state.scored_NK[:, j]
        x_N = x_N.masked_fill(~scored_N, 0)
        log_NR = (self._arrived(state, j) + self._emissions(state.h_NKD[:, j], x_N).double()).log_softmax(dim=1)
        return replace(
            state,
            log_filter_NR=torch.where(scored_N[:, None], log_NR, state.log_filter_NR),
            token_N=torch.where(scored_N, x_N, state.token_N),
            started_N=state.started_N | scored_N,
        )

    def marginals(self, h_NKD: Tensor, scored_NK: Tensor | None = None) -> Tensor:
        scored_NK = h_NKD.new_ones(h_NKD.shape[:2], dtype=torch.bool) if scored_NK is None else scored_NK
        prefix = prefix_of(scored_NK)
        h_NKD = prefix.take(h_NKD)
        log_NR, marginals = self._log_starts(h_NKD, prefix)[:, 0], []
        for i in range(h_NKD.shape[1]):
            joint_NRV = log_NR[..., None] + self.unembed(self.states(h_NKD[:, i]))
            marginals.append(joint_NRV.logsumexp(dim=1))
            if i + 1 < h_NKD.shape[1]:
                log_NR = self._moved(joint_NRV, h_NKD[:, i + 1])
        return prefix.scatter(torch.stack(marginals, dim=1))

    def _moved(self, joint_NRV: Tensor, h_ND: Tensor) -> Tensor:
        """log q(z_{i+1}) (N, R) from log q(z_i, x_i) and the state at i + 1, over the vocabulary in chunks."""
        n, r, v = joint_NRV.shape
        log_NR = joint_NRV.new_full((n, r), -torch.inf)
        for token_C in torch.arange(v, device=h_ND.device).split(max(1, unembedding.CELLS // (n * r * r))):
            moves_NCPR = self.moves(h_ND[:, None], token_C[None])
            part_NCPR = moves_NCPR + joint_NRV[..., token_C].transpose(1, 2)[..., None]
            log_NR = torch.logaddexp(log_NR, part_NCPR.flatten(1, 2).logsumexp(dim=1))
        return log_NR
