"""From what every step leaves behind to the record of a logged one."""

import resource
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imm_scale.parallel import world
from imm_scale.parallel.deepspeed_engine import StepResult
from imm_scale.training.optimizer_statistics import OptimizerStatistics
from imm_scale.training.utilization import Utilization

_QUARTERS = ("loss_t_0_25", "loss_t_25_50", "loss_t_50_75", "loss_t_75_100")


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
        self._groups: list[tuple[Tensor, Tensor, Tensor]] = []  # losses, times and weights of each step
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
        self._groups.append((result.groups.loss_G, result.groups.t_G, weight_G))

    def _quarters(self) -> Tensor:
        """(2, 4): the sum of losses and the number of groups by quarter of t."""
        sums = torch.zeros(2, len(_QUARTERS), dtype=torch.float64, device=self._device)
        if self._groups:
            loss_N, t_N, weight_N = (torch.cat(parts) for parts in zip(*self._groups, strict=True))
            quarter_N = (t_N * len(_QUARTERS)).long().clamp_(0, len(_QUARTERS) - 1)
            sums[0].index_add_(0, quarter_N, loss_N.double() * weight_N)
            sums[1].index_add_(0, quarter_N, weight_N.double())
        return sums

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
            into a quarter of t.
        """
        counts = torch.tensor(list(data.values()), dtype=torch.float64)
        statistics = self._statistics.sums(optimizer_steps)
        parts = [self._loss.view(1), self._quarters().view(-1), statistics, counts]
        together = torch.cat([part.to(self._device, non_blocking=True) for part in parts])
        whole = world.all_sum(together).cpu()
        loss, quarters, statistics, counts = whole.split([len(part) for part in parts])
        steps, seconds = len(self._seconds), time.perf_counter() - self._began
        waited = data_seconds - self._waited
        p50, p95 = np.percentile(self._seconds, [50, 95])
        record = {
            "loss": float(loss) / self._num_steps if self._num_steps else None,
            **{
                name: float(total / count) if count else None
                for name, total, count in zip(_QUARTERS, *quarters.view(2, -1), strict=True)
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


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: on the device, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
