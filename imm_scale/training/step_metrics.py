"""From what every step leaves behind to the record of a logged one."""

import logging
import resource
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imm_scale.build import ModelSpec
from imm_scale.config.schema import Config
from imm_scale.data.sample_order import Layout
from imm_scale.methods.base import GroupLosses, concatenated
from imm_scale.parallel import world
from imm_scale.parallel.deepspeed_engine import StepResult
from imm_scale.planner import flops
from imm_scale.training.optimizer_statistics import OptimizerStatistics

log = logging.getLogger("imm_scale")

_QUARTERS = ("loss_t_0_25", "loss_t_25_50", "loss_t_50_75", "loss_t_75_100")
# Where a method's monitors are averaged apart: by thirds of t, and of t - s with those groups aside whose s is t.
_REGIONS = ("t_0_33", "t_33_67", "t_67_100", "gap_0", "gap_0_33", "gap_33_67", "gap_67_100")
_TRIES = 4  # of the matrix product that utilization is told against


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
        passes, world_size = flops.step_passes(config.method, spec.net, layout.alignment), layout.world_size
        multiply_adds = flops.training_multiply_adds(spec.net, passes, config.train.global_batch_size)
        self._flops_per_step = 2.0 * multiply_adds
        peak = config.train.peak_flops or measured_peak(device, config.precision)
        total = torch.tensor(peak, dtype=torch.float64, device=device)
        self.peak = float(world.all_sum(total))
        whose = "measured by a matrix product" if config.train.peak_flops is None else "train.peak_flops"
        log.info("utilization is told against %.4g FLOP/s over %d ranks (%s)", self.peak, world_size, whose)

    def of(self, step_seconds: float) -> float:
        return self._flops_per_step / step_seconds / self.peak


class Meter:
    """Sums what happens between two records; all ranks add it up in one all-reduce at a record, and never else.

    A step queues one addition on the device and reads nothing from it; a record reads once.
    """

    def __init__(
        self,
        device: torch.device,
        global_batch_size: int,
        statistics: OptimizerStatistics,
        utilization: Utilization,
    ):
        self._device, self._batch = device, global_batch_size
        self._statistics, self._utilization = statistics, utilization
        self._waited = 0.0
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._groups: list[tuple[GroupLosses, Tensor]] = []  # of each step, with weights
        self._grad_norm, self._num_steps = 0.0, 0
        self._loss_scale: float | None = None
        self._seconds: list[float] = []
        self._began = time.perf_counter()

    def before_step(self, logged: bool) -> None:
        """A step begins; the update of a logged one is measured."""
        if logged:
            self._statistics.remember()

    def add(self, result: StepResult, weight_G: Tensor, seconds: float) -> None:
        """A step has ended.

        Args:
            weight_G: 1 for the groups of this rank's batch and 0 for padded slots.
            seconds: it took, waiting for data included.
        """
        self._seconds.append(seconds)
        self._loss_scale = result.loss_scale
        if result.skipped:
            return
        self._loss += result.loss
        self._grad_norm += result.grad_norm
        self._num_steps += 1
        self._groups.append((result.groups, weight_G))

    def _regional_sums(self) -> tuple[list[str], Tensor]:
        """Names of averages, and (2, names): the sums of what is averaged and of weights.

        All ranks have the same names: methods give the same monitors everywhere, and steps are skipped by all.
        """
        if not self._groups:
            return list(_QUARTERS), torch.zeros(2, len(_QUARTERS), dtype=torch.float64, device=self._device)
        groups = concatenated([losses for losses, _ in self._groups])
        weight_N = torch.cat([weight for _, weight in self._groups])
        names, sums = list(_QUARTERS), [_binned(groups.loss_G, weight_N, _parts(groups.t_G, 4), 4)]
        gap_N = groups.monitors.get("gap")
        if gap_N is None:
            names += groups.monitors
            everywhere_N = torch.zeros_like(weight_N, dtype=torch.int64)
            sums += [_binned(monitor_N, weight_N, everywhere_N, 1) for monitor_N in groups.monitors.values()]
        else:
            regions = {"t": (_parts(groups.t_G, 3), 3), "gap": ((gap_N > 0) * (1 + _parts(gap_N, 3)), 4)}
            for name in (name for name in groups.monitors if name != "gap"):
                names += [f"{name}_{region}" for region in _REGIONS]
                sums += [_binned(groups.monitors[name], weight_N, *region) for region in regions.values()]
        return names, torch.cat(sums, dim=1)

    @property
    def is_empty(self) -> bool:
        return not self._seconds

    def record(self, optimizer_steps: int, data_seconds: float, data: Mapping[str, int]) -> dict[str, Any]:
        """Means over the steps since the last record; a collective, so every rank calls it.

        Args:
            data_seconds: what the loader has waited so far in all.
            data: what reading has met so far in all, on this rank.

        Returns:
            Without what follows from the clock. Losses are None where every step was skipped, or where no group fell
            into a quarter of t; so are a method's monitors, by thirds of t and of t - s where it tells of gaps.
        """
        counts = torch.tensor(list(data.values()), dtype=torch.float64)
        statistics = self._statistics.sums(optimizer_steps)
        names, regional = self._regional_sums()
        parts = [self._loss.view(1), regional.view(-1), statistics, counts]
        together = torch.cat([part.to(self._device, non_blocking=True) for part in parts])
        whole = world.all_sum(together).cpu()
        loss, regional, statistics, counts = whole.split([len(part) for part in parts])
        steps, seconds = len(self._seconds), time.perf_counter() - self._began
        waited = data_seconds - self._waited
        p50, p95 = np.percentile(self._seconds, [50, 95])
        record = {
            "loss": float(loss) / self._num_steps if self._num_steps else None,
            **{
                name: float(total / count) if count else None
                for name, total, count in zip(names, *regional.view(2, -1), strict=True)
            },
            "grad_norm": self._grad_norm / self._num_steps if self._num_steps else None,
            **self._statistics.record(statistics.tolist()),
            **({} if self._loss_scale is None else {"loss_scale": self._loss_scale}),
            "images_per_second": self._batch * steps / seconds,
            "step_seconds": seconds / steps,
            "step_seconds_p50": float(p50),
            "step_seconds_p95": float(p95),
            "step_seconds_max": max(self._seconds),
            "data_seconds": waited / steps,
            "data_share": waited / seconds,
            "flops_utilization": self._utilization.of(seconds / steps),
            **{f"data_{name}": int(count) for name, count in zip(data, counts, strict=True)},
            "memory_bytes": memory_bytes(self._device),
        }
        self._waited = data_seconds
        self._reset()
        return record


def _parts(t_N: Tensor, parts: int) -> Tensor:
    """(N,) which of so many equal parts of [0, 1] each lies in."""
    return (t_N * parts).long().clamp_(0, parts - 1)


def _binned(values_N: Tensor, weight_N: Tensor, part_N: Tensor, parts: int) -> Tensor:
    """(2, parts): sums of weighted values and of weights by part."""
    sums = torch.zeros(2, parts, dtype=torch.float64, device=values_N.device)
    sums[0].index_add_(0, part_N, values_N.double() * weight_N)
    sums[1].index_add_(0, part_N, weight_N.double())
    return sums


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: on the device, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
