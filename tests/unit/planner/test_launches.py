"""What a micro-batch launches: the planner's figures against a count, and the goal around the blocks."""

from functools import cache

import pytest
import torch

from benchmarks.operators import METHODS, Launches, Operators, launches
from imm_scale.models.dit import size_config
from imm_scale.planner import activations

GOAL = 150


@cache
def _counted(method: str, half: bool = False, checkpointing: bool = False) -> Launches:
    return launches(method, compiled=False, half=half, checkpointing=checkpointing)


@cache
def _compiled(method: str) -> Launches:
    return launches(method, compiled=True)


def test_views_and_memory_are_no_operators():
    x = torch.randn(3, 4)
    with Operators() as operators:
        y = x.t()[1:].flatten().detach()  # flatten copies what it cannot view
        y.add_(1.0)
        (y * 2).expand(2, 9).unsqueeze(0)
        torch.empty(3)
    assert dict(operators.counts) == {"aten::clone": 1, "aten::add_.Tensor": 1, "aten::mul.Tensor": 1}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("method", ["imm", "flow_matching"])
def test_the_planner_launches_as_many_operations_a_block_as_are_counted(method, half, checkpointing):
    small, large = (size_config("DiT-S/2", depth=depth) for depth in (1, 2))
    one, two = (activations.kernels(net, METHODS[method].passes, half, checkpointing) for net in (small, large))
    assert two - one == _counted(method, half, checkpointing).a_block
    halved = activations.kernels(small, METHODS[method].passes, half, checkpointing, of_a_block=0.5)
    assert one - halved == 0.5 * _counted(method, half, checkpointing).a_block


@pytest.mark.parametrize("method", ["imm", "flow_matching"])
def test_compiled_draws_and_loss_keep_the_goal_around_the_blocks(method):
    """An H100's host needs about 5 us a launch; the blocks of a compiled XL/2 are some 700 of them."""
    compiled = _compiled(method)
    assert 0 < compiled.graphs < 40
    assert compiled.around + compiled.graphs <= GOAL
    low = launches(method, compiled=True, half=True)
    assert low.around + low.graphs <= GOAL
    # One operator after the other it is several times as many, most of them Philox's.
    eager = _counted(method)
    assert eager.graphs == 0 and eager.around > 4 * (compiled.around + compiled.graphs)
    assert eager.a_block == compiled.a_block


@pytest.mark.parametrize("method", ["imm", "flow_matching"])
def test_the_planner_launches_as_many_for_a_whole_net_as_are_counted(method):
    net, compiled = size_config("DiT-XL/2"), _compiled(method)
    whole = net.depth * compiled.a_block + compiled.around + compiled.graphs
    # 2 %: compilers differ in how many kernels they make of the same graph.
    assert activations.kernels(net, METHODS[method].passes, False, False) == pytest.approx(whole, rel=0.02)
