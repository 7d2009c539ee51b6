"""What drawing tokens costs, against a count of the calls that draw them."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from imm_scale import rng
from imm_scale.evaluation.tokens import work
from imm_scale.methods.base import Steps
from imm_scale.methods.tokens.token_net import TokenNet
from imm_scale.methods.tokens.unmask import unmask
from imm_scale.models.token_transformer import TokenArchitecture

T, D, V = 16, 8, 5
HIDDEN = 4 * D


def _net(**changes) -> TokenArchitecture:
    return TokenArchitecture(width=D, depth=2, heads=2, length=T, vocabulary=V, num_classes=3, **changes)


# A block: projections of T positions, attention over T x T pairs, the MLP, and six modulations of one label.
STATES = 2 * (4 * T * D * D + 2 * T * T * D + 2 * T * D * HIDDEN + 6 * 128 * D)
LOGITS = T * D * V


def test_steps_of_a_masked_net_are_whole_passes_but_draw_each_token_once():
    assert work.of_masked(_net(), 1, draws_all=False) == STATES + LOGITS
    assert work.of_masked(_net(), 4, draws_all=False) == 4 * STATES + LOGITS
    assert work.of_masked(_net(), 4, draws_all=True) == 4 * (STATES + LOGITS)


def test_the_states_are_those_that_the_sampler_computes():
    architecture = _net()
    net, index = TokenNet(architecture.build(), V, T), torch.arange(1)
    steps = Steps(
        torch.linspace(1, 0, 5, dtype=torch.float64),
        "unmask",
        uniform=lambda s, n: rng.uniform(0, "tokens", index, n, s),
    )
    start, label = torch.full((1, T), V), torch.zeros(1, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unmask(net, start, label, steps)
    heads = 4 * LOGITS  # this head computes logits of every place and throws most of them away
    assert counter.get_total_flops() // 2 == work.of_masked(architecture, 4, False) - LOGITS + heads


def test_blocks_cost_passes_and_no_work():
    one = work.of_blocks(_net(causal=True), 1)
    assert one == STATES + LOGITS
    ahead = {block: (T // block) * D * block * D for block in (2, 4)}  # a projection to B states, once a block
    for block in (2, 4):
        assert work.of_blocks(_net(causal=True, block=block), block) == one + ahead[block]
    assert ahead[2] == ahead[4], "whatever the blocks"


def test_refused_drafts_are_work_for_nothing():
    net, block = _net(causal=True, block=4), 4
    a_place = D * block * D + block * D * V
    # 1 + 3 x 4 positions of 16, and in each of 3 rounds the draft and the answers at 5 places.
    assert work.of_verified(net, T, block, 4.0) == round(STATES * 13 / 16 + 3 * 6 * a_place)
    assert work.of_verified(net, T, block, 5.0) > work.of_blocks(net, block)
    assert work.of_verified(net, T, block, 4.5) == pytest.approx(
        (work.of_verified(net, T, block, 4.0) + work.of_verified(net, T, block, 5.0)) / 2, abs=1
    ), "passes are a mean over samples"
