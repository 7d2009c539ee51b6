"""What a run says of itself: status.json, metrics.jsonl, wandb, and a line or a bar for whoever looks."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imm_scale import distributed, storage

Record = dict[str, Any]
METRICS = "metrics.jsonl"
STATUS = "status.json"
_SEGMENTS = "metrics"

log = logging.getLogger("imm_scale")


def write_status(run_dir: str, state: str, **details: Any) -> None:
    """status.json: running | completed | preempted | failed, with step, reason, host and rank. Rank 0 writes it."""
    status = {"state": state, "host": distributed.hostname(), "time": time.time(), **details}
    storage.write_text(storage.join(run_dir, STATUS), json.dumps(status, indent=1))


def read_status(run_dir: str) -> Record:
    """The last status, or {} for a folder that has none."""
    url = storage.join(run_dir, STATUS)
    return json.loads(storage.read_text(url)) if storage.exists(url) else {}


def _parse(text: str) -> list[Record]:
    """Records of JSON lines; a last line torn by a kill is left out."""
    lines = text.splitlines()
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return records


def read_metrics(run_dir: str) -> list[Record]:
    """All records of a run, in order of steps."""
    url = storage.join(run_dir, METRICS)
    if storage.is_local(run_dir):
        return _parse(storage.read_text(url)) if storage.exists(url) else []
    segments = storage.join(run_dir, _SEGMENTS)
    return [
        record
        for name in storage.list_names(segments)
        for record in _parse(storage.read_text(storage.join(segments, name)))
    ]


class MetricsLog:
    """metrics.jsonl of a run: appended to as it goes, and cut back to the last commit on resume.

    Object stores cannot append: with a remote run folder the records wait in memory and go up as a numbered segment
    at each commit.

    Args:
        run_dir: the run's folder.
        step: the step resumed from; records past it are dropped.
    """

    def __init__(self, run_dir: str, step: int):
        self._run_dir = run_dir
        self._local = storage.is_local(run_dir)
        self._unwritten: list[Record] = []
        if self._local:
            kept = [record for record in read_metrics(run_dir) if record["step"] <= step]
            storage.write_text(storage.join(run_dir, METRICS), "".join(json.dumps(r) + "\n" for r in kept))
        else:
            segments = storage.join(run_dir, _SEGMENTS)
            for name in storage.list_names(segments):
                if int(name.removesuffix(".jsonl")) > step:
                    storage.remove(storage.join(segments, name))

    def append(self, record: Record) -> None:
        if self._local:
            with open(storage.local_path(storage.join(self._run_dir, METRICS)), "a") as file:
                file.write(json.dumps(record) + "\n")
        else:
            self._unwritten.append(record)

    def commit(self, step: int) -> None:
        """Call after the checkpoint of that step is committed; the records up to it are kept from then on.

        Another thread may append later records meanwhile.
        """
        ready = [record for record in self._unwritten if record["step"] <= step]
        if ready:
            url = storage.join(self._run_dir, _SEGMENTS, f"{step:08d}.jsonl")
            storage.write_text(url, "".join(json.dumps(record) + "\n" for record in ready))
            del self._unwritten[: len(ready)]


class Meter:
    """Sums what happens between two records."""

    def __init__(self, device: torch.device, global_batch_size: int):
        self._device, self._batch = device, global_batch_size
        self._waited = 0.0
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._grad_norm, self._steps = 0.0, 0
        self._began = time.perf_counter()

    def add(self, loss: Tensor, grad_norm: float) -> None:
        self._loss += loss
        self._grad_norm += grad_norm
        self._steps += 1

    def record(
        self, step: int, images_seen: int, lr: float, data_seconds: float, data: Mapping[str, int]
    ) -> dict[str, Any]:
        """Means over the steps since the last record; a collective, so every rank calls it.

        Args:
            data_seconds: what the loader has waited so far in all.
            data: what reading has met so far in all, over all ranks.
        """
        loss = float(distributed.all_sum(self._loss)) / self._steps
        seconds = (time.perf_counter() - self._began) / self._steps
        record = {
            "step": step,
            "images_seen": images_seen,
            "loss": loss,
            "grad_norm": self._grad_norm / self._steps,
            "lr": lr,
            "images_per_second": self._batch / seconds,
            "step_seconds": seconds,
            "data_seconds": (data_seconds - self._waited) / self._steps,
            **{f"data_{name}": count for name, count in data.items()},
            "memory_bytes": memory_bytes(self._device),
            "time": time.time(),
        }
        self._waited = data_seconds
        self._reset()
        return record


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: on the device, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    from importlib.metadata import version

    names = ("imm-scale", "torch", "deepspeed", "numpy", "webdataset", "safetensors")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}
