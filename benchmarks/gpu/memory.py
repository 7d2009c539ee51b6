"""What an engine held is there again once it is closed, and three rewinds hold no more than one."""

import gc

import torch

from benchmarks.gpu import engines
from benchmarks.gpu.report import Context, Report
from imm_scale import fusion

_BUILDS = 3
_GROWTH = 0.05  # of what one engine holds
# A net whose states outweigh the batch, and buckets for its gradients that do not outweigh both.
_OVERRIDES = (
    "model.width=128",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "zero.extra.zero_optimization.reduce_bucket_size=100000",
)


def run(context: Context, report: Report) -> None:
    manifest = engines.write_latents(context.out / "memory-latents", 256, 8)
    with fusion.override(False):  # their compilation is not in question, and takes longer than all steps
        _build_each(context, report, manifest)


def _build_each(context: Context, report: Report, manifest: str) -> None:
    for stage in (0, 3) if context.small else range(4):
        _build(context, manifest, stage)  # what torch and DeepSpeed make once and keep
        before = _held(context)
        sizes = [_build(context, manifest, stage) for _ in range(_BUILDS)]
        left = _held(context) - before
        report.figure(f"stage {stage}: bytes an engine holds", sizes[0] - before)
        share = left / (sizes[0] - before)
        report.check(f"stage {stage}: left of it after {_BUILDS} were closed", share, at_most=_GROWTH)
        growth = (sizes[-1] - sizes[0]) / (sizes[0] - before)
        report.check(f"stage {stage}: growth from the first to the last", growth, at_most=_GROWTH)


def _build(context: Context, manifest: str, stage: int) -> int:
    """Bytes held beside an engine that has made a step."""
    overrides = [*engines.base_overrides(context, manifest), *_OVERRIDES, f"zero.stage={stage}"]
    with engines.opened(*overrides) as (engine, steps, _):
        assert not engine.step(next(steps), 1e-3).skipped
        return _held(context)


def _held(context: Context) -> int:
    """Bytes in tensors: of the GPU, or, on the CPU, of all that Python can find.

    Nothing is collected here: what only waits for it is memory that a rewind would have to find beside.
    """
    if context.device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    # Asked for by type: what a compiler traced with has no memory, and other objects answer to `__class__`.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
