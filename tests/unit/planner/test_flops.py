"""Counted cost against the closed form (imm.md section 5): multiply-adds as DiT counts them."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from imm_scale.choices import Passes
from imm_scale.methods.base import Steps
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.models.dit import DiT, DiTConfig, size_config
from imm_scale.planner import flops
from imm_scale.registry import METHODS

PUBLISHED = {"DiT-S/2": 6.054, "DiT-B/2": 23.003, "DiT-L/2": 80.695, "DiT-XL/2": 118.618}
TABLE_5 = {"DiT-S/2": 6.06, "DiT-B/2": 23.01, "DiT-L/2": 80.71, "DiT-XL/2": 118.64}


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("second_time", [False, True])
def test_forward_multiply_adds_are_the_published_ones(size, second_time):
    multiply_adds = flops.forward_multiply_adds(size_config(size, second_time=second_time)) / 1e9
    assert multiply_adds == pytest.approx(PUBLISHED[size], rel=1e-3)
    assert multiply_adds == pytest.approx(TABLE_5[size], rel=2e-3)  # Table 5 itself is up to 0.1 % higher still


def closed_form(net: DiTConfig) -> int:
    """Multiply-adds of one forward pass of one sample, embedders included, by hand."""
    tokens, width = net.tokens, net.width
    patch = net.patch_size**2 * net.channels
    hidden = int(width * net.mlp_ratio)
    attention = tokens * 4 * width**2 + 2 * tokens**2 * width
    mlp = 2 * tokens * width * hidden
    block = attention + mlp + 6 * width**2
    final = tokens * width * patch + 2 * width**2
    embedders = (2 if net.second_time else 1) * (256 * width + width**2)
    embedders += net.guidance * (3 * 256 * width + width**2)
    return tokens * patch * width + net.depth * block + final + embedders


CONFIGS = [
    DiTConfig(32, 2, 2, 2, channels=4, height=8, image_width=8, num_classes=5),
    DiTConfig(48, 3, 4, 4, channels=3, height=8, image_width=16, num_classes=5, mlp_ratio=2.0, second_time=False),
    DiTConfig(32, 1, 4, 2, channels=1, height=4, image_width=6, num_classes=2, mlp_ratio=2.5, qk_norm=True),
    DiTConfig(32, 1, 4, 2, channels=1, height=4, image_width=6, num_classes=2, guidance=True),
    DiTConfig(32, 2, 4, 2, channels=1, height=4, image_width=6, num_classes=2, dropout=0.1, time_embedding="fourier"),
    *(size_config(f"DiT-{size}/{patch}") for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.width}-{config.depth}-{config.patch_size}")
def test_the_count_is_the_closed_form_to_the_unit(config):
    assert flops.forward_multiply_adds(config) == closed_form(config)


@pytest.mark.parametrize("config", CONFIGS[:4])
def test_the_count_is_that_of_a_real_forward_pass(config):
    """On the CPU with weights, every block of its own; MATH, for the counter misses fused attention. Equal."""
    net = DiT(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(*config.example(1))
    assert counter.get_total_flops() == 2 * flops.forward_multiply_adds(config)


def test_xformers_is_counted_as_the_attention_it_is():
    plain = CONFIGS[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said of a package that counting does not need
        assert flops.forward_multiply_adds(replace(plain, attention="xformers")) == closed_form(plain)


@pytest.mark.parametrize("config", CONFIGS[:3])
def test_backward_costs_two_forwards(config):
    """Up to the first layer, whose input needs no gradient, and the embedders: a few percent of a tiny net."""
    net = DiT(config)
    x = torch.zeros(1, config.channels, config.height, config.image_width)
    time, label = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(x, time, time if config.second_time else None, label).sum().backward()
    total = counter.get_total_flops() / (2 * flops.forward_multiply_adds(config))
    assert 2.7 < total <= 3.0


def test_a_step_of_imm_costs_four_forwards_a_sample_and_of_flow_matching_three():
    """imm.md section 5: one no-grad forward, one forward, one backward of two forwards."""
    net = size_config("DiT-XL/2")
    forward = flops.forward_multiply_adds(net)
    assert flops.training_multiply_adds(net, Passes(grad=1, no_grad=1), 4096) == 4 * 4096 * forward
    assert flops.training_multiply_adds(net, Passes(), 4096) == 3 * 4096 * forward
    assert flops.training_multiply_adds(net, Passes(grad=1, no_grad=1), 4096) == pytest.approx(
        4 * 118.618e9 * 4096, rel=1e-3
    )


def test_multiply_adds_of_one_block_by_hand():
    """Depth d + 1 less depth d, T tokens of width D, MLP of 4 D: 12 T D^2 + 2 T^2 D + 6 D^2."""
    one, two = (DiTConfig(64, depth, 4, 2, height=8, image_width=8) for depth in (1, 2))
    tokens, width = 16, 64
    by_hand = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2
    assert flops.forward_multiply_adds(two) - flops.forward_multiply_adds(one) == by_hand


def test_what_a_net_is_told_of_its_guidance_is_counted_among_its_parameters():
    told, plain = flops.parameters(CONFIGS[3]), flops.parameters(replace(CONFIGS[3], guidance=False))
    width = CONFIGS[3].width
    assert told.total - plain.total == (3 * 256 + 1) * width + (width + 1) * width
    assert told.tensors - plain.tensors == 4 and told.half == plain.half and told.block == plain.block


# ---------------------------------------------------------------------------------------------------------------------
# Samples of several blocks


def stream_closed_form(net: DiTConfig) -> tuple[int, int]:
    """Multiply-adds of the clean stream and of a branch, what masks hide left out, by hand.

    A stream is a pass of the plain net but for attention, of which (1 + 1 / J) / 2 is allowed. A branch has a condition
    for each block; the clean stream has one, and no final layer, and nothing after the last keys and values.
    """
    tokens, width = net.tokens, net.width
    attention = net.depth * 2 * tokens**2 * width
    allowed = net.depth * tokens * (tokens + tokens // net.blocks) * width
    final = tokens * width * net.patch_size**2 * net.channels + 2 * width**2
    times = (2 if net.second_time else 1) * (256 * width + width**2)
    row = net.depth * 6 * width**2 + times  # a condition: its times, and what every block makes of it
    plain = closed_form(replace(net, blocks=1)) - attention + allowed
    unseen = allowed // net.depth + tokens * width**2 + 2 * tokens * width * int(width * net.mlp_ratio)
    return plain - final - unseen, plain + (net.blocks - 1) * (row + 2 * width**2)


BLOCKS = [
    DiTConfig(32, 2, 2, 2, channels=4, height=8, image_width=8, num_classes=5, blocks=2),
    DiTConfig(48, 3, 4, 4, channels=3, height=16, image_width=8, num_classes=5, second_time=False, blocks=4),
    *(size_config("DiT-XL/2", blocks=blocks) for blocks in (2, 4, 8, 16)),
]


@pytest.mark.parametrize("net", BLOCKS, ids=lambda net: f"{net.width}-{net.blocks}")
def test_the_count_of_streams_is_the_closed_form_to_the_unit(net):
    assert tuple(flops.stream_multiply_adds(net)) == stream_closed_form(net)
    assert flops.forward_multiply_adds(net) == closed_form(replace(net, blocks=1))


@pytest.mark.parametrize("blocks", [2, 4, 8, 16])
def test_a_training_sample_of_xl_costs_at_most_7_1_forwards(blocks):
    """Clean 3, with gradient 3, without 1, against 4 at once; flow matching 6 against 3."""
    net = size_config("DiT-XL/2", blocks=blocks)
    imm, flow_matching = (METHODS.config(name)() for name in ("imm", "flow_matching"))
    assert 6.5 < flops.step_passes(imm, net, 1).forwards <= 7.1
    assert 5.5 < flops.step_passes(flow_matching, net, 1).forwards <= 6.1
    assert flops.step_passes(imm, replace(net, blocks=1), 1).forwards == 4


@pytest.mark.parametrize(("blocks", "steps"), [(2, 4), (4, 1), (4, 2), (8, 1)])
def test_sampling_costs_a_clean_pass_of_all_blocks_but_the_last(blocks, steps):
    """(L + 1 - 1 / J) forwards, counted in the sampler, whose attention needs no mask.

    Within 2 %: attention sees (1 + 1 / J) / 2 of all pairs, and each call embeds its times anew.
    """
    net = DiTConfig(1152, 4, 16, 2, channels=4, height=32, image_width=32, num_classes=5, blocks=blocks)
    method = METHODS.get("imm")(METHODS.config("imm")().resolved("fp32"))
    with torch.device("meta"):
        flow_map = FlowMap(DiT(net), OTFlowMatching())
        start, label = torch.zeros(1, 4, 32, 32), torch.zeros(1, dtype=torch.int64)
        times = Steps(torch.linspace(0.994, 0.0, steps + 1, dtype=torch.float64, device="cpu"))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            method.sample(flow_map, start, label, times)
    forwards = counter.get_total_flops() / 2 / flops.forward_multiply_adds(net)
    assert forwards == pytest.approx(steps + 1 - 1 / blocks, rel=0.02)
