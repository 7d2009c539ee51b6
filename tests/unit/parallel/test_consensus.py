"""What ranks tell each other about a step, and that a GPU's host never waits for the stream of the passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from imm_scale.parallel import world
from imm_scale.parallel.consensus import StepConsensus, StepSummary
from tests import ranks


def _three_steps() -> list[StepSummary | None]:
    world.init(world.detect())
    rank, consensus = dist.get_rank(), StepConsensus(torch.device("cpu"))
    seen = [
        consensus.submit(
            step,
            rank == 1 and step == 2,
            torch.tensor(0.25 * (rank + step)).double(),
            10.0 * step + rank,
            lost=rank == 0 and step == 3,
        )
        for step in (1, 2, 3)
    ]
    return [*seen, consensus.settle(), consensus.settle()]


def test_all_ranks_learn_the_same_a_step_later():
    summaries = [StepSummary(1, 0, 0.75, 10.0), StepSummary(2, 1, 1.25, 20.0), StepSummary(3, 0, 1.75, 30.0, 1)]
    assert ranks.run(_three_steps, 2) == [[None, *summaries, None]] * 2


class _Gpu:
    """Stands for torch.cuda and NCCL, on CPU memory: notes what is asked of them, and in which stream.

    Attributes:
        calls: stream and request, in order.
        memory: (device, whether pinned) of each tensor made.
        copies: (stream, elements, whether without waiting).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[str] = []
        self.memory: list[tuple[str, bool]] = []
        self.copies: list[tuple[str, int, bool]] = []
        self._stream, self._events = "passes", 0
        zeros, copy = torch.zeros, torch.Tensor.copy_

        def noted_zeros(*size, dtype, pin_memory=False, device="host"):
            self.memory.append((str(device), pin_memory))
            return zeros(*size, dtype=dtype)

        def noted_copy(into, other, non_blocking=False):
            self.copies.append((self._stream, into.numel(), non_blocking))
            return copy(into, other)

        monkeypatch.setattr(torch, "zeros", noted_zeros)
        monkeypatch.setattr(torch.Tensor, "copy_", noted_copy)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self._stands_for(wait_stream="wait for {}"))
        monkeypatch.setattr(torch.cuda, "Event", self._event)
        monkeypatch.setattr(torch.cuda, "stream", self._entered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the passes so far")
        monkeypatch.setattr(dist, "all_reduce", self._all_reduce)
        monkeypatch.setattr(dist, "get_rank", lambda: 0)

    def _stands_for(self, **methods: str) -> object:
        """An object whose methods note these words."""

        def noting(template: str) -> Callable[..., None]:
            return lambda _, *args: self.calls.append(f"{self._stream}: {template.format(*args)}")

        return type("Stand", (), {name: noting(template) for name, template in methods.items()})()

    @contextmanager
    def _entered(self, stream: object) -> Iterator[None]:
        self._stream = "own"
        yield
        self._stream = "passes"

    def _event(self) -> object:
        self._events += 1
        return self._stands_for(record=f"record {self._events}", synchronize=f"host waits for {self._events}")

    def _all_reduce(self, tensor: torch.Tensor, async_op: bool) -> object:
        assert async_op
        self.calls.append(f"{self._stream}: all-reduce")
        return self._stands_for(wait="wait for the all-reduce")


def test_on_a_gpu_the_host_waits_for_the_last_steps_event_only(monkeypatch):
    gpu = _Gpu(monkeypatch)
    consensus = StepConsensus(torch.device("cuda", 0))
    exchange = ["passes: wait for the passes so far", "own: all-reduce", "own: wait for the all-reduce"]
    assert consensus.submit(1, False, torch.tensor(0.5).double(), 2.0) is None
    assert gpu.calls == [*exchange, "own: record 1"]
    gpu.calls.clear()
    assert consensus.submit(2, True, torch.tensor(0.25).double(), 3.0) == StepSummary(1, 0, 0.5, 2.0)
    assert gpu.calls == ["passes: host waits for 1", *exchange, "own: record 2"]
    assert consensus.settle() == StepSummary(2, 1, 0.25, 3.0)
    assert gpu.calls[-1] == "passes: host waits for 2"
    assert consensus.settle() is None


def test_on_a_gpu_host_memory_is_pinned_and_no_copy_waits(monkeypatch):
    gpu = _Gpu(monkeypatch)
    StepConsensus(torch.device("cuda", 0)).submit(1, False, torch.tensor(0.5).double(), 2.0)
    assert gpu.memory == [("host", True), ("cuda:0", False)]
    # To the device, the loss inside the device, and back.
    assert gpu.copies == [("own", 4, True), ("own", 1, False), ("own", 4, True)]
