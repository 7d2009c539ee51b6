"""A gradient that is not finite changes nothing on any rank; fp16 lowers its scale, and says so."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu.engines import same
from benchmarks.gpu.engines import states as held
from imm_scale.data.loader import Batch
from imm_scale.parallel import deepspeed_engine as engines
from imm_scale.training.replay import gradient_is_bad
from tests import ranks
from tests.conftest import TINY
from tests.distributed.engines import opened

LR = 1e-3
CASES = (
    ("zero.stage=0",),
    ("zero.stage=0", "train.grad_clip=0.1", "train.micro_batch_size=16"),
    ("zero.stage=1",),
    ("zero.stage=1", "zero.offload=optimizer", "train.micro_batch_size=16"),
    ("zero.stage=2", "train.micro_batch_size=16", "train.grad_clip=0.1"),
    ("zero.stage=3", "train.micro_batch_size=16"),
    ("zero.stage=3", "zero.offload=optimizer"),
    ("zero.stage=3", "zero.offload=parameters", "train.micro_batch_size=16"),
)


def _spoiled(micro_batches: list[Batch]) -> list[Batch]:
    """One value of the last rank's first micro-batch is infinite."""
    first = micro_batches[0]
    x = first.x.clone()
    if dist.get_rank() == dist.get_world_size() - 1:
        x[0, 0, 0, 0] = math.inf
    return [replace(first, x=x), *micro_batches[1:]]


def _skips(manifest: str, case: tuple[str, ...]) -> None:
    argv = [*TINY, f"data.manifest={manifest}", *case]
    states = []
    for spoil in (False, True):
        with opened(*argv) as (_, engine, steps):
            first, second = next(steps), next(steps)
            assert not engine.step(first, LR).skipped
            before = held(engine)
            if spoil:
                result = engine.step(_spoiled(second), LR)
                assert result.skipped and not math.isfinite(result.grad_norm), case
                last = dist.get_rank() == dist.get_world_size() - 1
                assert gradient_is_bad(engine, _spoiled(second), None) == last, f"{case}: only the last rank's own"
                assert not gradient_is_bad(engine, second, None), case
                assert same(held(engine), before) and engine.optimizer_steps() == 1, case
            result = engine.step(second, LR)
            assert not result.skipped and 0.0 < result.grad_norm < math.inf, case
            assert engine.optimizer_steps() == 2, case
            assert not same(held(engine), before), case
            states.append(held(engine))
    assert same(*states), f"{case}: the step after a skipped one is not the step it would have been"


def _all_skips(manifest: str) -> None:
    for case in CASES:
        _skips(manifest, case)


def test_one_infinite_value_on_one_rank_leaves_all_ranks_unharmed(digits):
    ranks.run(_all_skips, 2, digits)


def _one_bad_element(manifest: str, stage: int) -> list[bool]:
    """What each look back finds: a bad element of one parameter's gradient on rank 1 in the last micro-batch alone."""
    verdicts = []
    argv = [*TINY, f"data.manifest={manifest}", f"zero.stage={stage}", "train.micro_batch_size=16"]
    with opened(*argv) as (_, engine, steps):
        batch = next(steps)
        assert len(batch) == 2
        for poison in (1.0, math.nan, math.inf, -math.inf):
            passes = itertools.count()

            def spoil(gradient: torch.Tensor, poison: float = poison, passes: Iterator[int] = passes) -> torch.Tensor:
                factor = torch.ones_like(gradient)
                factor.view(-1)[-1] = poison if dist.get_rank() == 1 and next(passes) % 2 == 1 else 1.0
                return gradient * factor

            hook = engine.parameters[3].register_hook(spoil)
            verdicts.append(gradient_is_bad(engine, batch, None))
            hook.remove()
    return verdicts


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_one_bad_element_of_one_gradient_is_found_on_its_rank(stage, digits):
    assert ranks.run(_one_bad_element, 2, digits, stage) == [[False] * 4, [False, True, True, True]]


def _fp16(manifest: str, stage: int) -> list[tuple[float, bool, float]]:
    """(loss scale, skipped, norm) of steps at a scale far too high, until some have worked."""
    # CPUs compute fp16 slowly but rightly; the refusal is about speed.
    engines.check_device = lambda config: None
    history = []
    argv = [*TINY, f"data.manifest={manifest}", "precision=fp16", f"zero.stage={stage}", "train.grad_clip=0.1"]
    with opened(*argv) as (_, engine, steps):
        assert engine.loss_scale is not None
        engine.loss_scale.value = 2.0**24
        batch = next(steps)
        before = held(engine)
        for _ in range(24):
            result = engine.step(batch, LR)
            assert result.loss_scale is not None
            history.append((result.loss_scale, result.skipped, result.grad_norm))
            if not result.skipped:
                break
            assert gradient_is_bad(engine, batch, result.loss_scale), "the scale it ran with, not the halved one"
            assert engine.loss_scale.value == result.loss_scale / 2
            assert same(held(engine), before)
        for _ in range(2):
            assert not engine.step(batch, LR).skipped
        assert engine.optimizer_steps() == 3
        total = torch.stack([tensor.double().sum() for tensor in held(engine).values()]).sum()
        assert torch.isfinite(total)
    return history


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp16_halves_its_scale_until_the_step_holds(stage, digits):
    first, second = ranks.run(_fp16, 2, digits, stage)
    assert first == second, "ranks disagree about what was skipped"
    *skipped, (scale, last_skipped, norm) = first
    assert skipped and all(entry[1] for entry in skipped) and not last_skipped
    assert [entry[0] for entry in first] == [2.0 ** (24 - i) for i in range(len(first))]
    # The norm is of the gradient itself, whatever the scale: fp32 gives the same to fp16's 3 digits.
    with_fp32 = ranks.run(_fp32_norm, 1, digits)[0]
    assert norm == pytest.approx(with_fp32, rel=2e-2), scale


def _fp32_norm(manifest: str) -> float:
    with opened(*TINY, f"data.manifest={manifest}", "method.min_gap=1e-4") as (_, engine, steps):
        return engine.step(next(steps), LR).grad_norm
