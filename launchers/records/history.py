"""What became of the starts of a run (RUN/launcher.json), and what follows from it. Nothing here talks to SLURM."""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from imm_scale import storage
from imm_scale.errors import UserError

FILE = "launcher.json"
FAILURES_OF_A_NODE = 2  # after so many it is excluded
IDLE_STARTS = 2  # after so many in a row without progress the run stops

# refused: the user's mistake; interrupted: SLURM or a dead node ended it; failed: a rank died or gave up.
Outcome = Literal["completed", "preempted", "cancelled", "refused", "interrupted", "failed"]


@dataclass
class Start:
    """One time SLURM gave the job nodes.

    Attributes:
        job: id, ARRAY_TASK for a task of an array.
        restart: 0, and one more each time SLURM puts the job back.
        step: committed when it began; end_step: when it ended.
        code: the state of the checkout.
        outcome: None while it runs.
        failed_nodes: nodes that failed in it.
    """

    job: str
    restart: int
    nodes: list[str]
    step: int
    time: float
    code: str = "unknown"
    outcome: Outcome | None = None
    reason: str = ""
    end_step: int = 0
    failed_nodes: list[str] = field(default_factory=list)


def _start(fields: dict[str, Any]) -> Start:
    """A start from launcher.json; version 0.1 wrote failed_nodes as culprits."""
    return Start(**{"failed_nodes" if key == "culprits" else key: value for key, value in fields.items()})


@dataclass(frozen=True)
class Verdict:
    """Whether a run goes on, and why not."""

    go_on: bool
    reason: str = ""


@dataclass
class History:
    """The starts of a run, oldest first; those of earlier jobs too, which count for nothing but stay readable."""

    job: str
    starts: list[Start] = field(default_factory=list)
    stopped: str = ""

    @classmethod
    def load(cls, run_dir: str, job: str) -> "History":
        """Raises UserError for a file that is not ours."""
        url = storage.join(run_dir, FILE)
        if not storage.exists(url):
            return cls(job)
        try:
            document: dict[str, Any] = json.loads(storage.read_text(url))
            return cls(job, [_start(fields) for fields in document["starts"]], document["stopped"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{url} cannot be read ({error!r}): remove it, the restarts are counted anew") from error

    def save(self, run_dir: str) -> None:
        """Writes launcher.json into the run folder."""
        storage.write_text(storage.join(run_dir, FILE), json.dumps(dataclasses.asdict(self), indent=1))

    @property
    def of_this_job(self) -> list[Start]:
        """Starts under the job id at hand, oldest first."""
        return [start for start in self.starts if start.job == self.job]

    @property
    def ended(self) -> list[Start]:
        """Those of them that have an outcome."""
        return [start for start in self.of_this_job if start.outcome is not None]

    @property
    def open(self) -> Start | None:
        """The start that has no end yet."""
        return next((start for start in self.of_this_job if start.outcome is None), None)

    def failures(self) -> Counter[str]:
        """How often each node failed."""
        return Counter(node for start in self.ended for node in start.failed_nodes)

    def excluded(self) -> list[str]:
        """Nodes the job is to be kept off."""
        return sorted(node for node, count in self.failures().items() if count >= FAILURES_OF_A_NODE)

    def verdict(self, max_restarts: int) -> Verdict:
        """Whether the job may start once more.

        Stopping as asked is free as long as steps come of it; failures are bounded by `max_restarts`. A failure that
        has just led to the exclusion of a node does not count as idle: what caused it is gone.
        """
        ended = self.ended
        if not ended:
            return Verdict(True)
        last = ended[-1]
        if last.outcome in ("completed", "cancelled", "refused"):
            return Verdict(False, last.reason)
        faults = sum(start.outcome in ("failed", "interrupted") for start in ended)
        if faults > max_restarts:
            return Verdict(False, f"{faults} starts failed, --max-restarts is {max_restarts}; last: {last.reason}")
        recent = ended[-IDLE_STARTS:]
        idle = len(recent) == IDLE_STARTS and all(start.end_step <= start.step for start in recent)
        if idle and not self._just_excluded():
            return Verdict(False, f"no progress past step {last.end_step} in {IDLE_STARTS} starts; last: {last.reason}")
        return Verdict(True)

    def _just_excluded(self) -> bool:
        failures = self.failures()
        return any(failures[node] == FAILURES_OF_A_NODE for node in self.ended[-1].failed_nodes)
