"""Which steps count as spikes or as skipped, and what is done about them."""

import math

import pytest
import torch
import torch.distributed as dist

from imm_scale import distributed
from imm_scale.errors import RunError
from imm_scale.training.consensus import StepSummary
from imm_scale.training.guard import (
    GRADIENT,
    LOSS,
    OVERFLOW,
    Rewind,
    Rewinds,
    Skips,
    SpikeGuard,
    find_cause,
    is_stepped_over,
    union,
)
from tests import ranks


def _result(loss: float, grad_norm: float, step: int = 1) -> StepSummary:
    return StepSummary(step, 0, loss, grad_norm)


def test_a_spike_is_a_value_beyond_the_factor_times_the_median():
    guard = SpikeGuard(10.0, {})
    values = [1.0 + 0.1 * (i % 3) for i in range(20)]  # median 1.1
    assert [guard.judge(_result(v, 2 * v)) for v in values] == [None] * 20
    assert guard.judge(_result(10.9, 2.0)) is None
    assert guard.judge(_result(11.1, 2.0)) == "the loss 11.1 is 10.1 times its running median 1.1"
    assert guard.judge(_result(1.0, 22.1)) == "the grad_norm 22.1 is 10 times its running median 2.2"
    assert guard.judge(_result(math.nan, 1.0)) is None, "that is a skipped step, which is counted elsewhere"


def test_nothing_is_judged_before_there_is_a_history_nor_without_a_factor():
    young = SpikeGuard(10.0, {})
    assert [young.judge(_result(10.0**i, 1.0)) for i in range(10)] == [None] * 10
    off = SpikeGuard(None, {"loss": [1.0] * 100, "grad_norm": [1.0] * 100})
    assert off.judge(_result(1e9, 1e9)) is None


def test_a_guard_goes_on_from_what_it_remembered():
    first = SpikeGuard(10.0, {})
    for _ in range(40):
        first.judge(_result(1.0, 1.0))
    second = SpikeGuard(10.0, first.state())
    assert second.state() == first.state()
    assert second.judge(_result(11.0, 1.0)) is not None


def test_skips_are_counted_by_cause_and_bounded_in_a_row():
    skips = Skips(3, {LOSS: 5})
    skips.add(1, LOSS, "a")
    skips.add(2, GRADIENT, "b")
    skips.good()
    skips.add(4, GRADIENT, "c")
    skips.add(5, GRADIENT, "d")
    assert skips.counts == {"overflow": 0, LOSS: 6, GRADIENT: 3}
    with pytest.raises(RunError, match=r"3 steps in a row .*the last at step 6: e\."):
        skips.add(6, GRADIENT, "e")


def test_rewinds_are_bounded_between_two_checkpoints_only():
    rewinds = Rewinds(2)
    for step in (11, 12, 21, 22):
        rewinds.add(Rewind(step, 64 * (step - 1), "why"), step // 10 * 10, 64)
    assert rewinds.ranges == [(640, 704), (704, 768), (1280, 1344), (1344, 1408)]
    with pytest.raises(RunError, match="step 23 spikes: why; 2 rewinds to step 20"):
        rewinds.add(Rewind(23, 1408, "why"), 20, 64)


def test_ranges_are_joined_and_found():
    ranges = union([(64, 128)], [(256, 320), (128, 192), (256, 320)])
    assert ranges == [(64, 192), (256, 320)]
    assert [is_stepped_over(ranges, n) for n in (0, 64, 128, 192, 256, 320)] == [False, True, True, False, True, False]


def _causes(losses: list[list[float]], bad: list[bool], scaled: bool) -> tuple[str, str, int]:
    """On one of several ranks: cause, sentence, and how often its passes were run again."""
    distributed.init(distributed.detect())
    rank, again = dist.get_rank(), []  # type: ignore[var-annotated]
    cause, sentence = find_cause(
        torch.tensor(losses[rank]),
        torch.tensor([2 * rank, 2 * rank + 1]),
        lambda: again.append(1) or bad[rank],
        scaled,
        ["a", "b"],
    )
    return cause, sentence, len(again)


@pytest.mark.parametrize(
    ("losses", "bad", "scaled", "expected"),
    [
        (
            [[1.0, 1.0], [1.0, math.inf]],
            [True, True],
            True,
            (LOSS, "the loss is not finite on rank 1 (b), group 3", 0),
        ),
        (
            [[math.nan, math.nan], [1.0, math.inf]],
            [True, True],
            False,
            (LOSS, "the loss is not finite on rank 0 (a), group 0 (and 1 more); rank 1 (b), group 3", 0),
        ),
        (
            [[1.0, 1.0], [1.0, 1.0]],
            [False, True],
            False,
            (GRADIENT, "the gradient is not finite on rank 1 (b), though every loss is", 1),
        ),
        (
            [[1.0, 1.0], [1.0, 1.0]],
            [True, True],
            True,
            (OVERFLOW, "the scaled gradient overflowed on rank 0 (a), rank 1 (b)", 1),
        ),
        (
            [[1.0, 1.0], [1.0, 1.0]],
            [False, False],
            True,
            (OVERFLOW, "the scaled gradient overflowed (on no rank when its passes were run again)", 1),
        ),
    ],
)
def test_the_cause_of_a_skip_and_who_is_named(losses, bad, scaled, expected):
    assert ranks.run(_causes, 2, losses, bad, scaled) == [expected] * 2
