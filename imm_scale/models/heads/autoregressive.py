"""The autoregressive head: a small causal transformer over the tokens of S. No law is beyond it.

Legend: N samples, K positions with a state, D width, V vocabulary.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imm_scale.models.heads.base import Head, HeadOutput, begins, positions, prefix_of
from imm_scale.models.heads.causal import Caches, CausalTransformer, Positions
from imm_scale.models.heads.unembedding import inverse_cdf


@dataclass(frozen=True)
class _Pass:
    """What was observed: keys and values of the places asked for, which of them are in S, and the last token.

    Attributes:
        position_NK: of the token at each place.
        told_N: the position of the last token, -1 before the first.
        steps: for each place that was asked for, what the transformer answered, so that it is asked once.
    """

    h_NKD: Tensor
    scored_NK: Tensor
    position_NK: Tensor
    caches: Caches
    kept_NK: Tensor
    token_N: Tensor
    told_N: Tensor
    steps: dict[int, tuple[Tensor, Caches]] = field(default_factory=dict)


class AutoregressiveHead(Head):
    """q(x^S | h) = prod_i q(x_i | h, x_<i): the transformer's input is h_i + embedding of the token of S before i.

    Its queries stand where token i does, its keys where that other token does: S has gaps, which they would not know.
    """

    def __init__(self, width: int, vocabulary: int, heads: int, depth: int):
        super().__init__(width, vocabulary)
        self.start = vocabulary  # what stands before the first token
        self.embed = nn.Embedding(vocabulary + 1, width)
        nn.init.normal_(self.embed.weight, std=0.5)  # half of what a normalized state has
        self.transformer = CausalTransformer(width, heads, depth)

    def states(self, h_NKD: Tensor, x_NK: Tensor, position_NK: Tensor, set_NK: Tensor | None = None) -> Tensor:
        """What the transformer makes of a prefix, (N, K, D): each place knows its own h and the tokens before it.

        Args:
            set_NK: of several sets the one each place is in: it knows no tokens of others.
        """
        first_NK = begins(torch.zeros_like(x_NK) if set_NK is None else set_NK)
        before_NK = F.pad(x_NK[:, :-1], (1, 0)).masked_fill(first_NK, self.start)
        told_NK = torch.where(first_NK, position_NK, F.pad(position_NK[:, :-1], (1, 0)))
        return self.transformer(h_NKD + self.embed(before_NK), Positions(position_NK, told_NK), set_NK)

    def forward(self, h_NKD: Tensor, x_NK: Tensor, scored_NK: Tensor, uniform_NK: Tensor | None = None) -> HeadOutput:
        prefix = prefix_of(scored_NK)
        x_NK = prefix.take(x_NK).masked_fill(~prefix.scored, 0)
        log_prob_NK = self.unembed(self.states(prefix.take(h_NKD), x_NK, prefix.order_NK, prefix.apart), x_NK)
        return HeadOutput(log_prob_NK.masked_fill(~prefix.scored, 0.0).sum(dim=1))

    @torch.no_grad()
    def sample(self, h_NKD: Tensor, scored_NK: Tensor, uniform_NK2: Tensor) -> Tensor:
        """One step of the transformer for each scored token of the sample that has most."""
        prefix = prefix_of(scored_NK)
        uniform_NK, tokens = prefix.take(uniform_NK2[..., 0]), []
        state = self._begin(prefix.take(h_NKD), prefix.scored, prefix.order_NK)
        for i in range(int(scored_NK.sum(dim=1).max())):
            tokens.append(inverse_cdf(self.conditional(state, i), uniform_NK[:, i]))
            state = self.observe(state, i, tokens[-1])
        return prefix.scatter_tokens(tokens)

    def begin(self, h_NKD: Tensor, scored_NK: Tensor) -> _Pass:
        return self._begin(h_NKD, scored_NK, positions(scored_NK))

    def _begin(self, h_NKD: Tensor, scored_NK: Tensor, position_NK: Tensor) -> _Pass:
        start_N = torch.full((len(h_NKD),), self.start, device=h_NKD.device)
        caches: Caches = [None] * len(self.transformer.blocks)
        return _Pass(h_NKD, scored_NK, position_NK, caches, scored_NK[:, :0], start_N, torch.full_like(start_N, -1))

    def _step(self, state: _Pass, j: int) -> tuple[Tensor, Caches]:
        if j not in state.steps:
            itself_N1 = torch.ones_like(state.scored_NK[:, :1])
            x_ND = state.h_NKD[:, j] + self.embed(state.token_N)
            kept_NK = torch.cat([state.kept_NK, itself_N1], dim=1)
            asked_N = state.position_NK[:, j]
            told_N = torch.where(state.told_N < 0, asked_N, state.told_N)
            at = Positions(asked_N[:, None], told_N[:, None])
            state.steps[j] = self.transformer.step(x_ND, at, state.caches, kept_NK)
        return state.steps[j]

    def conditional(self, state: _Pass, j: int) -> Tensor:
        return self.unembed(self._step(state, j)[0]).double().log_softmax(dim=-1)

    def observe(self, state: _Pass, j: int, x_N: Tensor) -> _Pass:
        scored_N = state.scored_NK[:, j]
        return replace(
            state,
            caches=self._step(state, j)[1],
            kept_NK=torch.cat([state.kept_NK, scored_N[:, None]], dim=1),
            token_N=torch.where(scored_N, x_N, state.token_N),
            told_N=torch.where(scored_N, state.position_NK[:, j], state.told_N),
            steps={},
        )

    def marginals(self, h_NKD: Tensor, scored_NK: Tensor | None = None) -> Tensor:
        """Of each token as the first, and only, one of S."""
        nothing = self._nothing(h_NKD)
        first_NKD = self.states(h_NKD.flatten(0, 1)[:, None], nothing, nothing)
        return self.unembed(first_NKD).view(*h_NKD.shape[:2], -1)

    @staticmethod
    def _nothing(h_NKD: Tensor) -> Tensor:
        return torch.zeros(h_NKD.shape[0] * h_NKD.shape[1], 1, dtype=torch.int64, device=h_NKD.device)
