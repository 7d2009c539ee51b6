"""Where the records of a run go: metrics.jsonl, wandb, log files, and a line or a bar for whoever looks."""

import glob
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from imm_scale import storage
from imm_scale.checkpoint.run_folder import MetricsLog, Record
from imm_scale.config.load import to_yaml
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World

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


def check_wandb_key(config: Config, world: World) -> None:
    """Raises UserError, on every rank, for wandb.mode=online without a key: asking for one would hang a job."""
    missing = world.is_main and config.wandb.mode == "online" and not _has_wandb_key()
    if not distributed.all_agree(not missing, distributed.device(world)):
        raise UserError(
            "wandb.mode=online, but no key is set up: run `wandb login`, set WANDB_API_KEY, or use wandb.mode=offline "
            "and `wandb sync` later"
        )


def _has_wandb_key() -> bool:
    import wandb

    return bool(wandb.login(prompt=False))


def _automatic_mode() -> Any:  # one of wandb's modes; it checks the environment's word itself
    return os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")


class Wandb:
    """A wandb run beside the metrics; what goes wrong there is said once and stops nothing."""

    def __init__(self, config: Config):
        self._run: Any = None
        self._run_dir = config.run_dir
        self._try("start", lambda: self._start(config))

    def _start(self, config: Config) -> None:
        import wandb

        w = config.wandb
        self._run = wandb.init(
            mode=_automatic_mode() if w.mode == "auto" else w.mode,
            project=w.project,
            name=w.name or config.run.name,
            group=w.group,
            tags=w.tags,
            # The same run folder is the same wandb run, however often it is resumed.
            id=hashlib.sha256(os.path.abspath(config.run_dir).encode()).hexdigest()[:16],
            resume="allow",
            dir=storage.local_path(config.run_dir) if storage.is_local(config.run_dir) else None,
            config={"yaml": to_yaml(config)},
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Our own clock, not wandb's, which drops what a resumed run says of steps it has seen before.
        self._run.define_metric("*", step_metric="step")

    def _try(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service's client raises, training goes on
            log.warning("wandb is off from here on, it failed to %s: %s", what, error, exc_info=True)
            self._run = None

    def log(self, record: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._try("log", lambda: self._run.log(dict(record)))

    def finish(self) -> None:
        """Uploads the grids of samples and the report that lie in the run folder, and ends the wandb run."""
        if self._run is not None:
            self._try("upload what the run folder holds", self._upload)
        if self._run is not None:
            self._try("finish", lambda: self._run.finish())

    def _upload(self) -> None:
        import wandb

        if not storage.is_local(self._run_dir):
            return
        folder = storage.local_path(self._run_dir)
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), "samples", "*", "*.png"))):
            name = os.path.relpath(path, folder)
            self._run.log({os.path.splitext(name)[0]: wandb.Image(path)})
        report = os.path.join(folder, "report.html")
        if os.path.exists(report):
            artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
            artifact.add_file(report)
            self._run.log_artifact(artifact)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


class Progress:
    """A bar when a person is looking, unless TQDM_DISABLE=1 is set; else plain lines; silent on other ranks than 0."""

    def __init__(self, name: str, first: int, total: int, enabled: bool, unit: str = "images"):
        self._enabled, self._unit = enabled, unit
        self._name, self._total = name, total
        bar = tqdm(total=total, initial=first, desc=name, unit="step") if enabled and sys.stderr.isatty() else None
        self._bar = None if bar is None or bar.disable else bar

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def report(self, record: Record) -> None:
        if self._bar is not None:
            self._bar.set_postfix(
                {"loss": _shown(record["loss"]), f"{self._unit}_s": f"{record['images_per_second']:.0f}"}
            )
        elif self._enabled:
            print(
                f"{self._name}: step {record['step']}/{self._total}  loss {_shown(record['loss'])}  "
                f"grad norm {_shown(record['grad_norm'])}  {record['images_per_second']:.0f} {self._unit}/s",
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
        self.progress = Progress(config.run.name, step, config.train.max_steps, self._main, config.data.space.UNIT)
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
