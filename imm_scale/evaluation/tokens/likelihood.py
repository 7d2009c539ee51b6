"""Negative log-likelihoods of held-out tokens by nets of ours, in nats a sequence.

Of a masked net nll@L = E sum_l -log q(x^{S_l} | x^{S_<l}) over orders, by its own head; of a causal net that of its
blocks, or of one token at a time. Legend: N samples, T tokens, L steps, B tokens of a block.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imm_scale import rng
from imm_scale.methods.tokens import masking
from imm_scale.methods.tokens.next_block import NextBlock
from imm_scale.methods.tokens.token_net import TokenNet


class MaskedScorer:
    """-log p of single tokens by a masked net: what its head says of a set of one token."""

    def __init__(self, net: TokenNet, device: torch.device):
        self._net, self._device = net, device

    @torch.no_grad()
    def labelled_scores(self, x_NT: Tensor, visible_NT: Tensor, label_N: Tensor) -> Tensor:
        """(N, T) nats, of each token by itself given the visible ones."""
        x, visible = x_NT.to(self._device), visible_NT.to(self._device)
        model: Any = self._net.model
        h = model(torch.where(visible, x, self._net.mask), label_N.to(self._device))
        alone = torch.ones(x.numel(), 1, dtype=torch.bool, device=self._device)
        log_prob = model.head.log_prob(h.flatten(0, 1)[:, None], x.flatten()[:, None], alone)
        return -log_prob.double().view_as(x).cpu()


@torch.no_grad()
def of_steps(
    net: TokenNet, x_NT: Tensor, label_N: Tensor, counts: Tensor, rank_NT: Tensor, uniform_NT: Tensor | None = None
) -> Tensor:
    """(N,) fp64 -log q of steps by the net's own head, each sample's own; their mean is nll@L.

    Args:
        counts: (L + 1,) visible tokens before each step, and after the last.
        rank_NT: place of each token in the order.
        uniform_NT: fp64, for heads that draw by a student of theirs: then this bounds -log of what the student draws
            from above in the mean over uniforms. Without them it is -log q of the student's teacher.
    """
    model: Any = net.model
    total = torch.zeros(len(x_NT), dtype=torch.float64, device=x_NT.device)
    for first, last in itertools.pairwise(counts.tolist()):
        h = model(torch.where(rank_NT < first, x_NT, net.mask), label_N)
        out = model.head(h, x_NT, (rank_NT >= first) & (rank_NT < last), uniform_NT)
        total += out.nll
    return total


def uniforms(seed: int, ordinal_N: Tensor, length: int) -> Tensor:
    """(N, T) fp64 of samples, keyed by seed and ordinal, for heads that draw by a student."""
    return rng.uniform(seed, "evaluation_head", ordinal_N, length)


def orders(kind: str, seed: int, ordinal_N: Tensor, length: int) -> Tensor:
    """(N, T) ranks of an order that does not look at values, `random` ones keyed by seed and ordinal."""
    if kind == "left_to_right":
        return torch.arange(length).expand(len(ordinal_N), length)
    return masking.ranks(rng.uniform(seed, "evaluation_order", ordinal_N, length))


@torch.no_grad()
def of_blocks(net: TokenNet, x_NT: Tensor, label_N: Tensor, uniform_NT: Tensor | None = None) -> Tensor:
    """(N, T / B) fp64 -log q of each block given all tokens before, by a causal net's own head.

    Args:
        uniform_NT: as of `of_steps`.
    """
    model: Any = net.model
    size, length = model.config.block, x_NT.shape[1]
    starts = torch.arange(length, device=x_NT.device) % size == 0
    uniform = None
    if uniform_NT is not None:  # of the blocks at every place, those which begin nowhere read none
        uniform = F.pad(uniform_NT, (0, size - 1)).unfold(1, size, 1).flatten(0, 1)
    out = model(NextBlock.before(net, x_NT), label_N, x_NT, starts.expand_as(x_NT), None, uniform)
    return out.nll.view(x_NT.shape)[:, starts]


@torch.no_grad()
def of_next_tokens(net: TokenNet, x_NT: Tensor, label_N: Tensor) -> Tensor:
    """(N, T) fp64 -log p of each token given those before: the head's word on the first of each block."""
    model: Any = net.model
    h = model.states_ahead(model(NextBlock.before(net, x_NT), label_N)).flatten(0, 1)
    state = model.head.begin(h, torch.ones(h.shape[:2], dtype=torch.bool, device=x_NT.device))
    return -model.head.conditional(state, 0).gather(1, x_NT.flatten()[:, None]).view(x_NT.shape)
