"""Ranks sum gradients in fp32 under autocast too, at every stage, unless zero.reduce_precision allows less."""

import torch
import torch.distributed as dist

from tests import ranks
from tests.conftest import TINY
from tests.distributed.engines import opened

BF16 = ("precision=bf16", "train.micro_batch_size=16")
HALF = "zero.reduce_precision=autocast"
CASES = [(f"zero.stage={stage}", *more) for stage in (1, 2, 3) for more in ((), (HALF,))]


def _first_moment(manifest: str, *case: str) -> torch.Tensor:
    """Adam's first moment after one step, a tenth of the gradient, of all parameters in one row."""
    with opened(*TINY, *BF16, f"data.manifest={manifest}", *case) as (_, engine, steps):
        engine.step(next(steps), 1e-3)
        names = [name for name, _ in engine._named]
        sizes = {name: torch.Size(engine._shapes[name]).numel() for name in names}
        whole = {name: torch.zeros(sizes[name], dtype=torch.float64) for name in names}
        for shard in engine.master_slices():
            whole[shard.name][shard.offset : shard.offset + shard.numel] = shard.states["exp_avg"]
    moment = torch.cat([whole[name] for name in names])
    dist.all_reduce(moment)
    return moment


def _distances(manifest: str) -> dict[tuple[str, ...], float]:
    """Of every case from stage 0, which has always summed in fp32; relative."""
    reference = _first_moment(manifest, "zero.stage=0")
    distances = {case: _first_moment(manifest, *case).sub_(reference).norm() for case in CASES}
    return {case: float(distance / reference.norm()) for case, distance in distances.items()}


def test_sums_over_ranks_are_of_fp32(digits):
    for case, distance in ranks.run(_distances, 2, digits)[0].items():
        if HALF in case:
            assert 2**-12 < distance < 2**-7, f"{case}: bf16 rounds to 2^-9, {distance}"
        else:
            assert distance < 1e-6, f"{case}: {distance}"  # fp32 rounds to 6e-8; micro-batches and ranks add up in turn
