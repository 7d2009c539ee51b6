"""Every ZeRO stage, precision, offload, checkpointing and compiled blocks against stage 0 in fp32, eager."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import abilities, engines
from benchmarks.gpu.report import Context, Report
from imm_scale import fusion
from imm_scale.parallel.deepspeed_engine import Engine

_STEPS = 3
_FP16_SCALE = 2.0**12  # below the one a run starts with, whose first steps may overflow; `overflow` is about that
_PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
# Of the loss and of what the steps made of the weights, both relative to stage 0 in fp32. Products in fp32 differ by
# the order of their sums. Rounded to bf16 and fp16, 2^-9 and 2^-12, they moved the weights' change by 3e-3 and 4e-4 on
# a CPU, whatever the stage, and the loss by 1e-6; the net of a GPU is three times as deep, and its matrix units drop
# what tf32 has no bits for, 2^-10.
_LOSS = {"fp32": 1e-5, "tf32": 1e-4, "fp16": 1e-4, "bf16": 1e-3}
_UPDATE = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}


class _Case(NamedTuple):
    stage: int
    precision: str
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([f"stage {self.stage}, {self.precision}", *self.more])


class _Trained(NamedTuple):
    """Losses of the steps, and what they changed of all weights, both fp64 on the CPU."""

    losses: Tensor
    update: Tensor


def run(context: Context, report: Report) -> None:
    engines.allow_all_precisions(context)
    manifest = engines.write_latents(context.out / "stages-latents", 256, 8 if context.small else 16)
    reference = _train(context, manifest, _Case(0, "fp32"))
    report.check(
        "the reference has learned: loss of its last step over that of its first", _fall(reference), at_most=0.99
    )
    for case in _one_of_each(_cases()) if context.small else _cases():
        missing = _missing(context, case)
        if missing:
            report.skip(str(case), missing)
        else:
            _compare(report, case, _train(context, manifest, case), reference)


def _cases() -> Iterator[_Case]:
    for precision in _PRECISIONS:
        for stage in range(4):
            if (stage, precision) != (0, "fp32"):
                yield _Case(stage, precision)
    for stage in (1, 2, 3):
        yield _Case(stage, "bf16", ("zero.offload=optimizer",))
    yield _Case(3, "bf16", ("zero.offload=parameters",))
    yield _Case(3, "fp32", ("zero.offload=parameters",))
    for stage in (0, 1, 3):
        yield _Case(stage, "bf16", ("train.activation_checkpointing=true",))
    for stage, precision in ((0, "fp32"), (2, "bf16")):
        yield _Case(stage, precision, ("train.compile=true",))
    yield _Case(1, "bf16", ("train.compile=true", "train.activation_checkpointing=true"))


def _one_of_each(cases: Iterable[_Case]) -> list[_Case]:
    """A case for each precision and way of computing, at one stage or another."""
    kinds: dict[tuple[str, tuple[str, ...]], list[_Case]] = {}
    for case in cases:
        kinds.setdefault((case.precision, case.more), []).append(case)
    return [alike[number % len(alike)] for number, alike in enumerate(kinds.values())]


def _missing(context: Context, case: _Case) -> str:
    if "train.compile=true" in case.more and abilities.lacks_compiler(context):
        return abilities.lacks_compiler(context)
    return abilities.lacks_precision(context, case.precision)


def _train(context: Context, manifest: str, case: _Case) -> _Trained:
    torch.compiler.reset()  # blocks of another case's net would count as recompilations
    overrides = [f"zero.stage={case.stage}", f"precision={case.precision}", *case.more]
    # Draws and loss uncompiled: the reset has every case compile them anew, which takes longer than its steps.
    with (
        fusion.override(False),
        engines.opened(*engines.base_overrides(context, manifest), *overrides) as (engine, steps, _),
    ):
        if engine.loss_scale is not None:
            engine.loss_scale.value = _FP16_SCALE
        before = _weights(engine)
        results = [engine.step(next(steps), 1e-3) for _ in range(_STEPS)]
        assert not any(result.skipped for result in results), f"{case}: a step was skipped"
        losses = torch.stack([result.loss.double().cpu() for result in results])
        return _Trained(losses, _weights(engine) - before)


def _weights(engine: Engine) -> Tensor:
    shards = sorted(engine.held_slices(), key=lambda shard: shard.name)
    return torch.cat([shard.states["weight"].double().cpu() for shard in shards])


def _fall(trained: _Trained) -> float:
    return float(trained.losses[-1] / trained.losses[0])


def _compare(report: Report, case: _Case, actual: _Trained, expected: _Trained) -> None:
    losses = float(((actual.losses - expected.losses).abs() / expected.losses).max())
    report.check(f"{case}: losses, relative", losses, at_most=_LOSS[case.precision])
    update = float((actual.update - expected.update).norm() / expected.update.norm())
    report.check(f"{case}: change of the weights, relative", update, at_most=_UPDATE[case.precision])
