"""How much of the hardware's arithmetic a step uses."""

import logging
import time

import torch

from imm_scale.build import ModelSpec
from imm_scale.config.schema import Config
from imm_scale.data.sample_order import Layout
from imm_scale.parallel import world
from imm_scale.planner import flops

log = logging.getLogger("imm_scale")
_TRIES = 4


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of a few square matrix products in the precision of training: what this rank can reach.

    The factors are random, for a GPU multiplies constants with less power and so at a higher clock than any net's.
    """
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}
    size = 8192 if device.type == "cuda" else 768
    generator = torch.Generator(device).manual_seed(0)
    dtype = low.get(precision, torch.float32)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_TRIES + 1):  # the first one warms up
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


class Utilization:
    """Model FLOPs utilization: arithmetic the model needs (recomputation does not count) over what the ranks could do.

    Made on every rank at once: where no peak is named, each measures its own, and they are added up.
    """

    def __init__(self, config: Config, spec: ModelSpec, layout: Layout, device: torch.device):
        passes, world_size = config.method.passes_at(layout.alignment), layout.world_size
        multiply_adds = flops.training_multiply_adds(spec.net, passes, config.train.global_batch_size)
        self._flops_per_step = 2.0 * multiply_adds
        peak = config.train.peak_flops or measured_peak(device, config.precision)
        total = torch.tensor(peak, dtype=torch.float64, device=device)
        self.peak = float(world.all_sum(total))
        whose = "measured by a matrix product" if config.train.peak_flops is None else "train.peak_flops"
        log.info("utilization is told against %.4g FLOP/s over %d ranks (%s)", self.peak, world_size, whose)

    def of(self, step_seconds: float) -> float:
        return self._flops_per_step / step_seconds / self.peak
