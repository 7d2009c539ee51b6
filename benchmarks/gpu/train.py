"""`imm-scale train` end to end: a signal, resume at another ZeRO stage, and a micro-batch that is too large."""

import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import engines
from benchmarks.gpu.job import Job
from benchmarks.gpu.report import Context, Report
from imm_scale import config as configs
from imm_scale.checkpoint import run_folder
from imm_scale.cli import EXIT_PREEMPTED, main
from imm_scale.parallel.deepspeed_engine import LossModule
from imm_scale.training import trainer

_PATIENCE = 40.0  # seconds for a run of moments to get anywhere
# Stages sum in another order, fp32 rounds to 6e-8, and a hundred steps of Adam multiply what that comes to.
_SAME = 1e-3


def run(context: Context, report: Report) -> None:
    engines.allow_all_precisions(context)
    manifest = engines.write_latents(context.out / "train-latents", 256, 8)
    run_dir, too_large = (engines.fresh_folder(context.out / name) for name in ("train-run", "train-too-large"))
    steps = 12 if context.small else 100
    overrides = [*engines.base_overrides(context, manifest), f"train.max_steps={steps}"]
    with (
        _command(context, "train-first", [*overrides, f"run.dir={run_dir}", "zero.stage=1"]) as first,
        _command(context, "train-second", [*overrides, f"run.dir={run_dir}", "zero.stage=3"]) as second,
        _too_large(context, too_large) as third,
    ):
        _interrupted(report, first, run_dir)
        _resumed(report, second, run_dir, steps)
        _refused(report, third, too_large, context.out / "train-too-large.log")
    _compared(report, run_dir, _undisturbed(context, overrides))


def _command(context: Context, name: str, overrides: Sequence[str]) -> Job:
    return Job(context.method, context.out / f"{name}.log", _imports, partial(main, ["train", *overrides]))


def _imports() -> None:
    import deepspeed  # noqa: F401


def _interrupted(report: Report, job: Job, run_dir: Path) -> None:
    job.go()
    _await_first_step(job, run_dir)
    os.kill(job.pid, signal.SIGUSR1)
    code = job.wait(_PATIENCE)
    report.check("exit code after SIGUSR1", str(code), equals=str(EXIT_PREEMPTED))
    status = run_folder.read_status(str(run_dir))
    report.check("status after SIGUSR1", status["state"], equals="preempted")
    report.figure("step it was stopped at", status["step"])


def _await_first_step(job: Job, run_dir: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while not run_folder.read_metrics(str(run_dir)):
        assert time.monotonic() < until, f"no step in {_PATIENCE:g} s"
        code = job.wait(0.01)
        assert code is None, f"the run ended with exit code {code}"


def _resumed(report: Report, job: Job, run_dir: Path, steps: int) -> None:
    stopped = run_folder.read_status(str(run_dir))["step"]
    report.check("steps left for the second run", steps - stopped, at_least=1)
    job.go()
    report.check("exit code of the second run, at another stage", str(job.wait(_PATIENCE)), equals="0")
    report.check("status of the second run", run_folder.read_status(str(run_dir))["state"], equals="completed")
    records = run_folder.read_metrics(str(run_dir))
    numbers = [record["step"] for record in records]
    report.check("every step once and in order", numbers == list(range(1, steps + 1)), equals=True)
    samples_per_step = {record["images_seen"] / record["step"] for record in records}
    report.check("samples a step, throughout", len(samples_per_step), equals=1)


def _too_large(context: Context, run_dir: Path) -> Job:
    """A run that asks for some 300 GB of activations; without a GPU, one that is told there is no memory."""
    samples, side, size = (32, 8, ()) if context.small else (2048, 32, ("model.size=DiT-B/2",))
    manifest = engines.write_latents(context.out / "train-large-latents", samples, side)
    overrides = [*engines.base_overrides(context, manifest), f"run.dir={run_dir}", "train.max_steps=1"]
    if size:
        overrides = [override for override in overrides if not override.startswith("model.")]
    overrides += [*size, f"train.global_batch_size={samples}", f"train.micro_batch_size={samples}"]
    act = partial(_without_memory if context.small else main, ["train", *overrides])
    return Job(context.method, context.out / "train-too-large.log", _imports, act)


def _without_memory(argv: Sequence[str]) -> int:
    def forward(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory (said by the benchmark: there is no GPU)")

    LossModule.forward = forward  # type: ignore[method-assign, assignment]
    return main(argv)


def _refused(report: Report, job: Job, run_dir: Path, log: Path) -> None:
    job.go()
    code = job.wait(_PATIENCE)
    report.check("micro-batch too large: it ended by itself, and not well", code in (1, 2), equals=True)
    status = run_folder.read_status(str(run_dir))
    report.check("micro-batch too large: status", status["state"], equals="failed")
    names_memory = "out of memory" in status["reason"]
    report.check("micro-batch too large: the reason names the memory", names_memory, equals=True)
    names_key = "train.micro_batch_size" in log.read_text(errors="replace")
    report.check("micro-batch too large: train.micro_batch_size is named", names_key, equals=True)


def _undisturbed(context: Context, overrides: Sequence[str]) -> list[float]:
    """Losses of the same run without a break, in this process."""
    run_dir = engines.fresh_folder(context.out / "train-reference")
    trainer.train(configs.load([], [*overrides, f"run.dir={run_dir}", "zero.stage=1"]).config)
    return _losses(run_dir)


def _losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in run_folder.read_metrics(str(run_dir))]


def _compared(report: Report, run_dir: Path, expected: list[float]) -> None:
    apart = max(abs(a / b - 1.0) for a, b in zip(_losses(run_dir), expected, strict=True))
    report.check("losses against a run without a break, relative", apart, at_most=_SAME)
