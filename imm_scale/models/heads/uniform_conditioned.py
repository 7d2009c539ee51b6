"""The head that takes its randomness as an input: one pass draws dependent tokens, each told a uniform of every one.

An autoregressive head is the teacher: it says which uniforms its inverse distribution functions turn into the tokens
of the data. The student learns to read those tokens off them, all at once. Where it does so without doubt it draws what
the teacher would, and nothing bounds what a deterministic map of k uniforms can express.
Legend: N samples, K positions with a state, D width, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor

from imm_scale.models.heads.autoregressive import AutoregressiveHead
from imm_scale.models.heads.base import Head, HeadOutput, Prefix, prefix_of
from imm_scale.models.heads.causal import CausalTransformer, Positions
from imm_scale.models.layers import TimeEmbedder

# Angles of a uniform are from 0.04 to 400 turns: all of (0, 1) at a glance, and tokens of one in a thousand.
_LARGEST_ANGLE = 2.0 * math.pi * 400


class UniformConditionedHead(Head):
    """The teacher's likelihood; draws in one pass of the student.

    `log_prob` and the sequential view are the teacher's, whose law `sample` only approximates: a draft that is to be
    verified comes from `conditional`. The student's cross entropy reaches the net's states, and not the teacher.
    """

    takes_uniforms = True

    def __init__(self, width: int, vocabulary: int, heads: int, depth: int):
        super().__init__(width, vocabulary)
        self.teacher = AutoregressiveHead(width, vocabulary, heads, depth)
        self.embed = TimeEmbedder(width, "positional")  # sinusoids of a number and an MLP, in fp32
        self.transformer = CausalTransformer(width, heads, depth)

    def student_states(
        self, h_NKD: Tensor, uniform_NK: Tensor, position_NK: Tensor, set_NK: Tensor | None = None
    ) -> Tensor:
        """What the student makes of a prefix (N, K, D): each place knows the uniforms of those before, and its own.

        Args:
            set_NK: of several sets the one each place is in: it knows no uniforms of others.
        """
        embedded_ND = self.embed(uniform_NK.flatten() * _LARGEST_ANGLE)
        at = Positions(position_NK, position_NK)  # a place is told its own uniform
        return self.transformer(h_NKD + embedded_ND.view(*uniform_NK.shape, -1), at, set_NK)

    def forward(self, h_NKD: Tensor, x_NK: Tensor, scored_NK: Tensor, uniform_NK: Tensor | None = None) -> HeadOutput:
        """Without uniforms the student learns nothing."""
        prefix = prefix_of(scored_NK)
        h_NKD, x_NK = prefix.take(h_NKD), prefix.take(x_NK).masked_fill(~prefix.scored, 0)
        where = prefix.order_NK, prefix.apart
        states_NKD = self.teacher.states(h_NKD, x_NK, *where)
        log_prob_N = self._summed(self.teacher.unembed(states_NKD, x_NK), prefix)
        if uniform_NK is None:
            return HeadOutput(log_prob_N)
        below_NK, mass_NK = self.teacher.unembed(states_NKD.detach(), x_NK, interval=True)
        placed_NK = below_NK + mass_NK * prefix.take(uniform_NK)
        student_NKD = self.student_states(h_NKD, placed_NK, *where)
        teaching_N = -self._summed(self.unembed(student_NKD, x_NK), prefix)
        return HeadOutput(log_prob_N, teaching_N, {"student_nll": teaching_N.detach()})

    @staticmethod
    def _summed(log_prob_NK: Tensor, prefix: Prefix) -> Tensor:
        return log_prob_NK.masked_fill(~prefix.scored, 0.0).sum(dim=1)

    @torch.no_grad()
    def sample(self, h_NKD: Tensor, scored_NK: Tensor, uniform_NK2: Tensor) -> Tensor:
        """One pass. The first uniform of a token conditions; the second draws from what doubt the student is left with.

        Not the likeliest token: of draws KL(data || samples) is at most the student's cross entropy + KL(data ||
        teacher), both of which are measured; an unsure student's likeliest tokens would be ever the same few.
        """
        prefix = prefix_of(scored_NK)
        uniform_NK2 = prefix.take(uniform_NK2)
        states_NKD = self.student_states(prefix.take(h_NKD), uniform_NK2[..., 0], prefix.order_NK)
        drawn_NK = self.unembed.draw(states_NKD, uniform_NK2[..., 1])
        return prefix.scatter(drawn_NK.masked_fill(~prefix.scored, 0))

    def begin(self, h_NKD: Tensor, scored_NK: Tensor) -> Any:
        return self.teacher.begin(h_NKD, scored_NK)

    def conditional(self, state: Any, j: int) -> Tensor:
        return self.teacher.conditional(state, j)

    def observe(self, state: Any, j: int, x_N: Tensor) -> Any:
        return self.teacher.observe(state, j, x_N)

    def marginals(self, h_NKD: Tensor, scored_NK: Tensor | None = None) -> Tensor:
        return self.teacher.marginals(h_NKD, scored_NK)
