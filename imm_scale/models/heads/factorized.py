"""The product head: each token on its own, given the net's states. What tokens of one step share is lost.

Legend: N samples, K positions with a state, D width, V vocabulary.
"""

import torch
from torch import Tensor

from imm_scale.models.heads.base import Head, HeadOutput


class FactorizedHead(Head):
    """q(x^S | h) = prod_i softmax(E h_i)[x_i]."""

    independent = True

    def forward(self, h_NKD: Tensor, x_NK: Tensor, scored_NK: Tensor, uniform_NK: Tensor | None = None) -> HeadOutput:
        outside_NK = scored_NK == 0
        log_prob_NK = self.unembed(h_NKD, x_NK.masked_fill(outside_NK, 0))
        return HeadOutput(log_prob_NK.masked_fill(outside_NK, 0.0).sum(dim=1))

    @torch.no_grad()
    def sample(self, h_NKD: Tensor, scored_NK: Tensor, uniform_NK2: Tensor) -> Tensor:
        return self.unembed.draw(h_NKD, uniform_NK2[..., 0]).masked_fill(~scored_NK, 0)

    def begin(self, h_NKD: Tensor, scored_NK: Tensor) -> Tensor:
        return h_NKD

    def conditional(self, state: Tensor, j: int) -> Tensor:
        return self.unembed(state[:, j]).double().log_softmax(dim=-1)

    def observe(self, state: Tensor, j: int, x_N: Tensor) -> Tensor:
        return state

    def marginals(self, h_NKD: Tensor, scored_NK: Tensor | None = None) -> Tensor:
        return self.unembed(h_NKD)
