"""Where the records of a run go: metrics.jsonl, wandb, log files, and a line or a bar for whoever looks."""

import hashlib
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from imm_scale import storage
from imm_scale.config import Config, to_yaml
from imm_scale.distributed import World
from imm_scale.training.metrics import MetricsLog, Record

log = logging.getLogger("imm_scale")


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


class Wandb:
    """A wandb run beside the metrics; what goes wrong there is said once and stops nothing."""

    def __init__(self, config: Config):
        import wandb

        self._failures = (wandb.errors.Error, OSError)
        self._run: Any = None
        w = config.wandb
        mode = w.mode if w.mode != "auto" else "online" if wandb.login(prompt=False) else "offline"
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


class RunLog:
    """Rank 0's records: metrics.jsonl, wandb and what is on the screen."""

    def __init__(self, config: Config, step: int, world: World):
        self._main = world.is_main
        self.progress = Progress(config.run.name, step, config.train.max_steps, self._main)
        if self._main:
            self._metrics = MetricsLog(config.run_dir, step)
            self._wandb = Wandb(config) if config.wandb.mode != "disabled" else None

    def write(self, record: dict[str, Any]) -> None:
        if self._main:
            self._metrics.append(record)
            self.progress.report(record)
            if self._wandb is not None:
                self._wandb.log(record)

    def commit(self, step: int) -> None:
        self._metrics.commit(step)

    def close(self) -> None:
        self.progress.close()
        if self._main and self._wandb is not None:
            self._wandb.finish()
