"""ZeRO stages 0 to 3 with reduction beside the backward pass and after it, on one rank; and the optimizer's step.

One rank sends nothing: what shows here is what the buckets, streams and copies cost, not what overlap saves.
"""

import torch
from torch import nn

from benchmarks.gpu import training
from benchmarks.gpu.case import net_config
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.step import LARGEST
from benchmarks.gpu.timing import Budget, Stopwatch, part
from imm_scale.models.dit import DiT

SIZE = "DiT-B/2"
_ROUNDS = 5
_SECONDS = 3  # to make an engine and to time it
_ADAM_BYTES = 28  # of fp32 a parameter: weight, gradient and two moments read, all but the gradient written


def run(context: Context, report: Report) -> None:
    budget = Budget(context, "overlap")
    with part(report, "optimizer step"):
        _optimizer(context, report)
    for stage in range(4):
        for overlaps in _settings(context, stage):
            name = f"{SIZE}, stage {stage}" + (f", overlap {'on' if overlaps else 'off'}" if stage else "")
            if budget.allows(report, name, _SECONDS):
                with part(report, name):
                    report.figure(name, 1e3 * _step_seconds(context, stage, overlaps), "ms")


def _settings(context: Context, stage: int) -> tuple[bool, ...]:
    """Stage 0 is DeepSpeed's plain engine, which has no such setting; on CPU an engine takes seconds to make."""
    if stage == 0:
        return (False,)
    return (True,) if context.small else (False, True)


def _step_seconds(context: Context, stage: int, overlaps: bool) -> float:
    samples = training.samples_of(context)
    # On CPU stage 0 refuses bf16, whose sums would differ from those of the other stages.
    overrides = [f"zero.stage={stage}", f"precision={'fp32' if context.small else 'bf16'}"]
    overrides += [f"zero.extra.overlap_comm={overlaps}".lower()] if stage else []
    settings = training.config(context, SIZE, samples, *overrides)
    with training.training_engine(context, settings, SIZE) as (engine, batch):
        (seconds,) = Stopwatch(context, _ROUNDS).medians(lambda: engine.step([batch], 1e-4), times=2)
    return seconds


def _optimizer(context: Context, report: Report) -> None:
    """AdamW over the parameters of the largest net, on random gradients."""
    with context.device:
        net = DiT(net_config(context, LARGEST))
    parameters = [p for p in net.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    numel = sum(p.numel() for p in parameters)
    for name, fused in {"fused": True, "foreach": False}.items():
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=fused, foreach=not fused)
        (seconds,) = Stopwatch(context).medians(optimizer.step)
        report.figure(f"{LARGEST}: AdamW, {name}", 1e3 * seconds, "ms")
        report.figure(f"{LARGEST}: AdamW, {name}, of memory", _ADAM_BYTES * numel / seconds / 1e9, "GB/s")
        del optimizer
    (norm,) = Stopwatch(context).medians(
        lambda: nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    )
    report.figure(f"{LARGEST}: norm of all gradients", 1e3 * norm, "ms")
