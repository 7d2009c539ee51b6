"""Counting nets the planner does not know: on a plain one by hand, and on DiTs against the closed forms."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from imm_scale import config as configs
from imm_scale.choices import Passes
from imm_scale.data.sample_order import Layout
from imm_scale.errors import UserError
from imm_scale.models.base import Architecture, Backbone
from imm_scale.models.dit import DiTConfig, size_config
from imm_scale.planner import activations, counting, estimate, flops, hardware, memory, text


class Mixer(nn.Module):
    """x + W x, or in odd blocks x + W W x."""

    def __init__(self, width: int, times: int):
        super().__init__()
        self.times = times
        self.inner = nn.Linear(width, width, bias=False)

    def forward(self, x_NI: Tensor) -> Tensor:
        y_NI = x_NI
        for _ in range(self.times):
            y_NI = torch.tanh(self.inner(y_NI))
        return x_NI + y_NI


class Stack(Backbone):
    def __init__(self, width: int, times: tuple[int, ...]):
        super().__init__()
        self.blocks = nn.ModuleList(Mixer(width, n) for n in times)
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, x: Tensor, c_noise: Tensor, second: Tensor | None, label: Tensor) -> Tensor:
        x = x + self.shift
        for block in self.blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class StackConfig(Architecture):
    width: int = 64
    times: tuple[int, ...] = (1, 2, 1, 2, 2)

    def build(self) -> Stack:
        return Stack(self.width, self.times)

    def example(self, samples: int) -> tuple[Tensor, Tensor, None, Tensor]:
        return torch.zeros(samples, self.width), torch.zeros(samples), None, torch.zeros(samples, dtype=torch.int64)


def test_a_net_of_unlike_blocks_by_hand():
    """Blocks of one size whose settings differ are counted each for itself: 8 products of 64 x 64."""
    net = StackConfig()
    assert flops.forward_multiply_adds(net) == sum(net.times) * 64**2
    counted = flops.parameters(net)
    assert (counted.total, counted.half, counted.block, counted.blocks, counted.fixed) == (
        5 * 4096,
        5 * 4096,
        4096,
        5,
        64,
    )


def test_what_a_plain_net_keeps_and_moves_by_hand():
    """fp32, 64 elements a sample. A block of one product keeps its input and a tanh, one of two another tanh."""
    footprint = counting.footprint(StackConfig(), half=False)
    vector = 64 * 4
    # An input is the sum of the block before.
    assert footprint.kept_by_block == pytest.approx((2 * 2 + 3 * 3) / 5 * vector)
    assert footprint.block_input == vector
    # The shift is added to the batch; a tanh reads and writes, a sum of two reads both: the products are left out.
    # The shift itself is the same for all samples.
    assert footprint.moved == pytest.approx((2 + 2 * 8 + 3 * 5) * vector)
    assert (footprint.block_operators, footprint.other_operators) == (8 + 8 + 5, 1)


def test_a_net_that_is_no_dit_is_planned():
    net = StackConfig()
    s = memory.Setting(
        net, 8, 4, 1, 1, 0, half=False, half_gradients=False, two_branches=True,
        tangent_samples=0, live_tangent=False, checkpointing=False, offload=False,
        bucket=0, overlap=False, decays=(),
    )  # fmt: skip
    most = memory.peak(s, flops.parameters(net))
    assert most.total > 16 * flops.parameters(net).total  # weight, gradient and moments in fp32
    forward = next(memory.moments(s, flops.parameters(net)))
    assert forward.activations == pytest.approx(5 * 8 * counting.footprint(net, False).kept_by_block)
    assert activations.kernels(net, Passes(grad=1, no_grad=1), False, False) > 2 * 22


def test_the_page_of_a_net_that_is_no_dit():
    config = configs.load([], ["train.global_batch_size=64", "train.micro_batch_size=32", "zero.stage=1"]).config
    layout = Layout(64, config.method.group_size, 2, 32)
    gpu, link = hardware.gpu("h100-80gb"), hardware.link(None)
    estimated = estimate._estimate(
        config, StackConfig(), estimate.Data((1, 8, 8), 10, 1024.0, None), layout, 1, 2, gpu, link
    )
    assert estimated.forward_flops == 2 * 8 * 64**2
    assert 0 < estimated.compute_seconds.low <= estimated.compute_seconds.high
    head = text.render(config, estimated, []).splitlines()[1]
    assert "(width 64), 20,480 trainable parameters" in head  # all that this net says of its shape
    json.dumps(estimate.as_dict(estimated))


def test_what_does_not_run_without_data_is_said():
    @dataclass(frozen=True)
    class Picky(StackConfig):
        def build(self) -> Stack:
            stack = super().build()
            stack.blocks[0].register_forward_pre_hook(lambda block, args: args[0].sum().item() and None)
            return stack

    with pytest.raises(UserError, match="Stack does not run on tensors without data"):
        flops.forward_multiply_adds(Picky())


DITS = [
    size_config("DiT-S/2"),
    size_config("DiT-B/4"),
    DiTConfig(128, 4, 4, 2, channels=4, height=16, image_width=16, num_classes=10, qk_norm=True),
]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("net", DITS, ids=lambda net: f"{net.width}")
def test_the_generic_count_of_a_dit_is_near_its_closed_forms(net, half):
    size = 2 if half else 4
    known, footprint = activations._of_dit(net, size), counting.footprint(net, half)
    assert footprint.kept_by_block == pytest.approx(known.block, rel=0.005)  # small vectors the formula leaves out
    assert footprint.block_input == known.block_input
    assert footprint.kept_around == pytest.approx(known.around, rel=0.05)
    assert footprint.widest == pytest.approx(known.widest, rel=0.15)  # the formula rounds up: "four or five"
    # The count is the most held beside all that was kept; the formula credits what the pass has let go of by then.
    assert known.workspace < footprint.workspace < 2.5 * known.workspace
    # The formula knows no norms of q and k, nor what is around the blocks.
    assert footprint.moved == pytest.approx(activations.elementwise_bytes(net, half), rel=0.9 if net.qk_norm else 0.1)


@pytest.mark.parametrize("half", [False, True])
def test_the_operators_of_a_dit_are_those_its_launches_are_told_by(half):
    footprint = counting.footprint(DITS[0], half)
    # activations.kernels: 19 a block; under autocast 21 and 8 casts of weights.
    assert footprint.block_operators / 12 == (29 if half else 19)
    # 38 or 50 a block in the backward pass, and what is around the blocks.
    assert footprint.backward_operators / 12 == pytest.approx(50 if half else 38, rel=0.1)
