"""Actions take turns, and what does not fit is skipped and not fatal."""

import time

import pytest
import torch

from benchmarks.gpu import timing
from benchmarks.gpu.case import Case
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.sections import limit_of
from imm_scale.models.dit import DiTConfig

SMALL = DiTConfig(width=32, depth=2, heads=2, patch_size=2, channels=4, height=8, image_width=8, num_classes=10)


def test_actions_take_turns_after_their_warm_ups():
    ran = []
    taken = timing.seconds([lambda: ran.append("a"), lambda: ran.append("b")], rounds=2, times=3, warm_ups=1)
    assert "".join(ran) == "a" + "b" + 2 * "aaabbb"
    assert [len(values) for values in taken] == [2, 2]


def test_the_time_is_that_of_one_run():
    ((seconds,),) = timing.seconds([lambda: time.sleep(0.02)], rounds=1, times=3, warm_ups=0)
    assert 0.02 <= seconds < 0.06  # a mean of three and not their sum, on however busy a machine


def test_a_part_that_does_not_fit_is_skipped_and_no_more(tmp_path):
    report = Report(tmp_path / "step.json")
    with timing.part(report, "XL, 64 samples"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 23 GiB.")
    with pytest.raises(ZeroDivisionError), timing.part(report, "L"):
        print(1 / 0)
    (entry,) = report.entries
    assert (entry.kind, entry.name) == ("skipped", "XL, 64 samples")
    assert entry.value == "too little memory: CUDA out of memory. Tried to allocate 2.00 GiB"


def test_what_no_longer_fits_a_section_is_skipped(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    report, limit = Report(tmp_path / "step.json"), limit_of("loss")
    budget = timing.Budget(Context("full", torch.device("cpu"), tmp_path), "loss")
    now[0] += limit - 10
    assert budget.allows(report, "S", 10) and not report.entries
    assert not budget.allows(report, "XL", 11)
    assert [(entry.kind, entry.name) for entry in report.entries] == [("skipped", "XL")]
    unlimited = timing.Budget(Context("small", torch.device("cpu"), tmp_path), "loss")
    now[0] += 10 * limit
    assert unlimited.allows(report, "XL", 11)


def test_a_step_counts_four_forwards():
    # Per block 4 T D^2 + 2 T^2 D of attention, 8 T D^2 of the MLP, 6 D^2 of the modulation; T = 16, D = 32, patches of
    # 2 x 2 x 4 values; embedders of two times with 256 channels; a multiply-add is two operations.
    block = 12 * 16 * 32**2 + 2 * 16**2 * 32 + 6 * 32**2
    around = 2 * 16 * 16 * 32 + 2 * 32**2 + 2 * (256 * 32 + 32**2)
    assert Case(SMALL, 8, "fp32", compiled=False).step_flops == 2 * 4 * 8 * (2 * block + around)


def test_a_step_and_its_passes_leave_gradients_of_one_step():
    tested = Case(SMALL, 8, "fp32", compiled=False)
    for action in (tested.step, tested.passes):
        action()
        once = [p.grad.clone() for p in tested.net.parameters()]
        action()
        # Gradients of the run before are gone: kept, they would double.
        assert all(torch.equal(p.grad, before) for p, before in zip(tested.net.parameters(), once, strict=True))


def test_no_gate_of_a_timed_net_is_zero():
    # A GPU multiplies zeros at less power: behind a closed gate the backward pass of a block would be too fast.
    tested = Case(SMALL, 8, "fp32", compiled=False)
    tested.passes()
    for block in tested.net.blocks:
        assert all(parameter.grad.abs().max() > 0 for parameter in block.parameters())
