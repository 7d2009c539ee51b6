"""The sampler of masked nets: from masks alone to tokens, a number of them in each step.

Legend: N samples, T tokens, L steps.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from imm_scale.methods.base import Steps
from imm_scale.methods.tokens import masking
from imm_scale.methods.tokens.token_net import TokenNet

_ORDER = 0  # the first stream of uniforms; step l draws from stream l


@torch.no_grad()
def unmask(net: TokenNet, start: Tensor, label: Tensor, steps: Steps) -> Tensor:
    """Ids (N, T) of `start` (N, T), where masked ones are drawn; labels (N,).

    `steps.times` are 1 - n / T. Tokens that `start` gives stay, and count as drawn: of U masked tokens so large a part
    is drawn in each step as of all T. In the order `confidence` each step draws all masked tokens and keeps those which
    the head finds most probable.
    """
    assert steps.uniform is not None, "tokens are drawn by uniforms"
    model: Any = net.model
    x, counts = start.clone(), masking.counts_at(steps.times.to(start.device), net.length)
    unknown = start == net.mask
    rank = _ranks(unknown, steps)
    number = unknown.sum(dim=1, keepdim=True)
    for step, (first, last) in enumerate(itertools.pairwise(counts), 1):
        left, uniforms = x == net.mask, _uniforms(steps, step, net.length)
        h = model(x, label)
        if steps.order == "confidence":
            drawn = model.head.sample(h, left, uniforms)
            there = number - left.sum(dim=1, keepdim=True)
            stays = _most_probable(model.head.marginals(h, left), drawn, left, number * last // net.length - there)
        else:
            stays = left & (rank >= number * first // net.length) & (rank < number * last // net.length)
            drawn = model.head.sample(h, stays, uniforms)
        x = torch.where(stays, drawn, x)
    return x


def _uniforms(steps: Steps, step: int, length: int) -> Tensor:
    """(N, T, 2) fp64: for each token, and for what it may share with others."""
    assert steps.uniform is not None
    return steps.uniform(step, 2 * length).unflatten(1, (length, 2))


def _ranks(unknown_NT: Tensor, steps: Steps) -> Tensor:
    """(N, T) place of each unknown token in the order; known ones have places behind all of them."""
    assert steps.uniform is not None
    length = unknown_NT.shape[1]
    if steps.order == "left_to_right":
        u = torch.arange(length, 0, -1, device=unknown_NT.device).double().expand_as(unknown_NT) / (length + 1)
    else:
        u = steps.uniform(_ORDER, length)
    return masking.ranks(torch.where(unknown_NT, u, -1.0))


def _most_probable(log_prob_NTV: Tensor, drawn_NT: Tensor, left_NT: Tensor, count_N1: Tensor) -> Tensor:
    """(N, T): which so many of the tokens that are left, drawn as they were, are the most probable."""
    score = log_prob_NTV.gather(2, drawn_NT[:, :, None])[:, :, 0].double()
    rank = masking.ranks(torch.where(left_NT, score, -torch.inf))
    return left_NT & (rank < count_N1)
