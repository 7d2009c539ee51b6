"""A forced fp16 overflow is skipped and lowers the scale; a batch that is not a number is named by its group."""

import re

import torch

from benchmarks.gpu import engines
from benchmarks.gpu.report import Context, Report
from imm_scale import config as configs
from imm_scale import fusion
from imm_scale.checkpoint import run_folder
from imm_scale.data.loader import Loader
from imm_scale.training import trainer

_TOO_HIGH = 2.0**60  # at this scale any gradient overflows fp16
_BAD_STEP, _BAD_GROUP_OF_STEP, _STEPS = 3, 2, 4
_PARTICLES = 4


def run(context: Context, report: Report) -> None:
    engines.allow_all_precisions(context)
    manifest = engines.write_latents(context.out / "overflow-latents", 256, 8)
    with fusion.override(False):  # their compilation is not in question, and takes longer than all steps
        for stage in (0, 3) if context.small else range(4):
            _overflow(context, report, manifest, stage)
        _not_a_number(context, report, manifest)


def _overflow(context: Context, report: Report, manifest: str, stage: int) -> None:
    name = f"stage {stage}, fp16"
    overrides = [
        *engines.base_overrides(context, manifest),
        "precision=fp16",
        f"zero.stage={stage}",
        "train.grad_clip=0.1",
    ]
    with engines.opened(*overrides) as (engine, steps, _):
        assert engine.loss_scale is not None
        engine.loss_scale.value = _TOO_HIGH
        batch, before = next(steps), engines.states(engine)
        result = engine.step(batch, 1e-3)
        report.check(f"{name}: the overflow is skipped", result.skipped, equals=True)
        report.check(f"{name}: scale after it", engine.loss_scale.value, equals=_TOO_HIGH / 2)
        report.check(
            f"{name}: weights and moments as before", engines.same(before, engines.states(engine)), equals=True
        )
        report.check(f"{name}: optimizer steps counted", engine.optimizer_steps(), equals=0)
        engine.loss_scale.value = 2.0**10
        report.check(f"{name}: the next step is taken", engine.step(batch, 1e-3).skipped, equals=False)
        report.check(f"{name}: and counted", engine.optimizer_steps(), equals=1)
        moved = not engines.same(before, engines.states(engine))
        report.check(f"{name}: and changes the weights", moved, equals=True)


def _not_a_number(context: Context, report: Report, manifest: str) -> None:
    """A run of a few steps, one of whose groups has a NaN in it."""
    run_dir = engines.fresh_folder(context.out / "overflow-run")
    overrides = [
        *engines.base_overrides(context, manifest),
        f"train.max_steps={_STEPS}",
        f"run.dir={run_dir}",
        "precision=fp16",
    ]
    config = configs.load([], overrides).config
    global_batch = config.train.global_batch_size
    _spoil((_BAD_STEP - 1) * global_batch, _BAD_GROUP_OF_STEP * _PARTICLES + 1)
    report.check("the run goes on after the batch", trainer.train(config), equals="completed")
    log = (run_dir / "logs" / "rank-00000.log").read_text()
    group = (_BAD_STEP - 1) * global_batch // _PARTICLES + _BAD_GROUP_OF_STEP
    matches = re.findall(r"step (\d+) is skipped .*the loss is not finite on rank 0 .*, group (\d+)", log)
    report.check("step and group named in the log", str(matches), equals=str([(str(_BAD_STEP), str(group))]))
    last = run_folder.read_metrics(str(run_dir))[-1]
    report.check("steps skipped for the loss", last["skipped_non_finite_loss"], equals=1)


def _spoil(images_seen: int, position: int) -> None:
    """Puts a NaN into one sample of the batch that starts there."""
    plain = Loader.__next__

    def following(loader: Loader):  # type: ignore[no-untyped-def]
        batch = plain(loader)
        if batch.images_seen == images_seen:
            batch.x[position] = torch.nan
        return batch

    Loader.__next__ = following  # type: ignore[method-assign, assignment]
