"""What a run says of itself: status.json, metrics.jsonl, wandb, and a line or a bar for whoever looks."""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

from imm_scale import distributed, storage
from imm_scale.config import Config, to_yaml

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
        """Call after the checkpoint of that step is committed."""
        if self._unwritten:
            url = storage.join(self._run_dir, _SEGMENTS, f"{step:08d}.jsonl")
            storage.write_text(url, "".join(json.dumps(record) + "\n" for record in self._unwritten))
            self._unwritten = []


class Wandb:
    """A wandb run beside the metrics; what goes wrong there is said once and stops nothing."""

    def __init__(self, config: Config):
        import wandb

        self._failures = (wandb.errors.Error, OSError)
        self._run: Any = None
        w = config.wandb
        mode = w.mode if w.mode != "auto" else "online" if wandb.api.api_key else "offline"
        folder = storage.local_path(config.run_dir) if storage.is_local(config.run_dir) else None
        try:
            self._run = wandb.init(
                mode=mode,
                project=w.project,
                name=w.name or config.run.name,
                group=w.group,
                tags=w.tags,
                # The same run folder is the same wandb run, however often it is resumed.
                id=hashlib.sha256(os.path.abspath(config.run_dir).encode()).hexdigest()[:16],
                resume="allow",
                dir=folder,
                config={"yaml": to_yaml(config)},
                settings=wandb.Settings(silent=True, console="off"),
            )
        except self._failures as error:
            log.warning("wandb is off for this run: %s", error)

    def log(self, record: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(dict(record), step=record["step"])
        except self._failures as error:
            log.warning("wandb is off from step %s on: %s", record["step"], error)
            self._run = None

    def finish(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except self._failures as error:
            log.warning("wandb did not finish: %s", error)


class Progress:
    """A bar when a person is looking, plain lines otherwise; silent on ranks other than 0."""

    def __init__(self, name: str, first: int, total: int, enabled: bool):
        self._enabled = enabled
        self._name, self._total = name, total
        self._bar = (
            tqdm(total=total, initial=first, desc=name, unit="step") if enabled and sys.stderr.isatty() else None
        )

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def report(self, record: Record) -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{record['loss']:.4g}", images_s=f"{record['images_per_second']:.0f}")
        elif self._enabled:
            print(
                f"{self._name}: step {record['step']}/{self._total}  loss {record['loss']:.5g}  "
                f"grad norm {record['grad_norm']:.3g}  {record['images_per_second']:.0f} images/s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    from importlib.metadata import version

    names = ("imm-scale", "torch", "deepspeed", "numpy", "webdataset", "safetensors")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def set_up_logging(run_dir: str, rank: int) -> None:
    """Messages of this rank go to logs/rank-NNNNN.log of a local run folder, and rank 0's to stderr as well."""
    log.setLevel(logging.INFO)
    log.handlers.clear()
    log.propagate = False
    handlers: list[logging.Handler] = []
    if storage.is_local(run_dir):
        folder = storage.join(storage.local_path(run_dir), "logs")
        os.makedirs(folder, exist_ok=True)
        handlers.append(logging.FileHandler(storage.join(folder, f"rank-{rank:05d}.log")))
    if rank == 0:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: on the device, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
