"""The plain sampler of causal nets: block after block, each drawn by the head from one pass over the one before.

Legend: N samples, T tokens, B tokens of a block.
"""

from typing import Any

import torch
from torch import Tensor

from imm_scale.errors import UserError
from imm_scale.methods.base import Steps
from imm_scale.methods.tokens.token_net import TokenNet


def known_prefix(net: TokenNet, start_NT: Tensor) -> Tensor:
    """(N,) how many tokens each sample begins with that are given.

    Raises:
        UserError: tokens that are given behind one that is not: a causal net cannot look ahead.
    """
    known = start_NT != net.mask
    prefix = known.long().cumprod(dim=1).sum(dim=1)
    if bool((known.sum(dim=1) != prefix).any()):
        raise UserError(
            "tokens are given behind ones that are to be drawn, which a causal net cannot see: give a prompt, or use a "
            "net of method.name=masked"
        )
    return prefix


@torch.no_grad()
def blocks(net: TokenNet, start: Tensor, label: Tensor, steps: Steps) -> Tensor:
    """Ids (N, T) of `start` (N, T), which may begin with a prompt; labels (N,).

    A sample that begins with P given tokens has ceil((T - P) / B) blocks, and all are drawn in as many passes as the
    longest needs.
    """
    assert steps.uniform is not None, "tokens are drawn by uniforms"
    model: Any = net.model
    size, length = model.config.block, net.length
    x, at, rows = start.clone(), known_prefix(net, start), torch.arange(len(start), device=start.device)
    cache = model.empty_cache(len(x))
    h = read_prompt(net, x, at.clamp_max(length - 1), label, cache)
    uniforms = steps.uniform(0, 2 * length).unflatten(1, (length, 2))
    rounds = -(-(length - int(at.min())) // size)  # asked for once: each answer waits for the device
    for left in reversed(range(rounds)):
        place = at[:, None] + torch.arange(size, device=x.device)
        wanted = place < length
        inside = place.clamp_max(length - 1)
        drawn = model.head.sample(model.states_ahead(h), wanted, uniforms[rows[:, None], inside])
        x = _put(x, place, drawn, wanted)
        if left:
            h = _advance(net, x, at, size, label, cache)
        at = (at + size).clamp_max(length)
    return x


def read_prompt(net: TokenNet, x_NT: Tensor, seen_N: Tensor, label_N: Tensor, cache: Any) -> Tensor:
    """States (N, D) of each sample after so many (N,) of its given tokens, whose keys and values are kept."""
    model: Any = net.model
    before = torch.cat([x_NT.new_full((len(x_NT), 1), net.mask), x_NT], dim=1)[:, : int(seen_N.max()) + 1]
    place = torch.arange(before.shape[1], device=x_NT.device).expand_as(before)
    states = model.states_kept(before, place, label_N, cache)
    return states[torch.arange(len(x_NT), device=x_NT.device), seen_N]


def _put(x_NT: Tensor, place_NB: Tensor, drawn_NB: Tensor, wanted_NB: Tensor) -> Tensor:
    """x with what was drawn at its places, those beyond the end left out."""
    longer = torch.cat([x_NT, x_NT[:, -1:]], dim=1)  # one place more, for what is not wanted
    return longer.scatter(1, torch.where(wanted_NB, place_NB, x_NT.shape[1]), drawn_NB)[:, :-1]


def _advance(net: TokenNet, x_NT: Tensor, at_N: Tensor, size: int, label_N: Tensor, cache: Any) -> Tensor:
    """States (N, D) after the tokens [at, at + B) of each sample, whose keys and values are kept."""
    model: Any = net.model
    # The state at place n has seen the tokens before n: that of at + B is the input token at + B - 1 at this place.
    # Samples that end before others go on where there is room, and are not looked at again.
    place = at_N.clamp_max(net.length - 1)[:, None] + torch.arange(1, size + 1, device=x_NT.device)
    h = model.states_kept(x_NT.gather(1, (place - 1).clamp_max(net.length - 1)), place, label_N, cache)
    return h[:, -1]
