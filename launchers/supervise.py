"""Runs the step of a job and decides what follows it. The *.sbatch files end in it; a person has no use for it.

    python -m launchers.supervise NUMBER_OF_ARGUMENTS ARGUMENT... COMMAND...

The arguments are what `imm-scale train` gets. They name the run, and its status.json says how the step ended: launchers
and srun rewrite exit codes. Without them (encode, evaluate) there is only the exit code. The job is put back in the
queue under its own id as long as that makes sense (history.py), and away from nodes that failed twice.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any, Literal

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.errors import UserError
from launchers import slurm
from launchers.records import snapshot
from launchers.records.history import History, Outcome, Start

CANCEL = "cancel"  # RUN/cancel holds the id of the job that is not to be put back
EXIT_REFUSED = 2
_FIRST_FAILURE = re.compile(rb"srun: error: (?:([\w.-]+): tasks? [\d,-]+: (.+)|Node failure on ([\w.-]+))")


@dataclass(frozen=True)
class Task:
    """This job as SLURM numbers it.

    Attributes:
        id: what scontrol takes for this job or this task of an array alone.
        restart: how often it was put back.
        nodes: names of its nodes.
    """

    id: str
    restart: int
    nodes: list[str]
    max_restarts: int

    @classmethod
    def of(cls, env: Mapping[str, str]) -> "Task":
        """The job as SLURM describes it in the environment; an element of an array is a job of its own."""
        job = env["SLURM_JOB_ID"]
        if "SLURM_ARRAY_TASK_ID" in env:
            job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
        restart = int(env.get("SLURM_RESTART_COUNT", 0))
        return cls(job, restart, slurm.hostnames(env["SLURM_JOB_NODELIST"]), int(env.get("MAX_RESTARTS", 10)))


@dataclass(frozen=True)
class Ended:
    """How a step ended.

    Attributes:
        code: srun's exit code; it says little.
        node: where the first task failed, if srun named one.
        how: in srun's words ("Killed", "Exited with exit code 1").
    """

    code: int
    node: str | None = None
    how: str = ""


def say(message: str) -> None:
    """A line of the launcher's own in the job's log."""
    print(f"launcher: {message}", file=sys.stderr, flush=True)


def run_step(command: Sequence[str], env: Mapping[str, str]) -> Ended:
    """Runs srun to its end; what it says of tasks that fail is passed on, and the first remembered."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(env))
    assert process.stderr is not None

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    # SLURM signals the ranks itself; this is for who signals the batch script (--signal=B:USR1@...).
    signal.signal(signal.SIGUSR1, forward)
    # SLURM ends the job; the ranks get this signal too and may still commit, so wait for them.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    node, how = _pass_on(process.stderr)
    code = process.wait()
    _ignore_sigterm()
    return Ended(code, node, how)


def _ignore_sigterm() -> None:
    """When SLURM ends a job it signals all of its processes. Those started from now on inherit that they ignore it, so
    that there are KillWait seconds to ask SLURM things and write down the answers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _pass_on(stream: IO[bytes]) -> tuple[str | None, str]:
    node, how = None, ""
    for line in stream:
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
        match = _FIRST_FAILURE.match(line)
        if match and node is None:
            node = (match[1] or match[3]).decode()
            how = _in_words((match[2] or b"node failure").decode(errors="replace").strip())
    return node, how


def _in_words(how: str) -> str:
    """rank.sh reports a rank killed by signal N as a shell does, with exit code 128 + N."""
    code = re.fullmatch(r"Exited with exit code (\d+)", how)
    if code and int(code[1]) - 128 in set(signal.Signals):
        return f"killed by {signal.Signals(int(code[1]) - 128).name}"
    return how


def job_owner(task: Task) -> Literal["supervisor", "slurm"]:
    """Who decides about this job: this process, while it runs or ran out of time; SLURM, which ends or requeues it."""
    states = slurm.jobs([task.id])
    ours = bool(states) and (states[0].state == "RUNNING" or states[0].reason == "TimeLimit")
    return "supervisor" if ours else "slurm"


def requeue(task: Task, excluded: Sequence[str]) -> None:
    """Requeues this job and waits for the end. Raises UserError where SLURM refuses."""
    _ignore_sigterm()
    _retry(lambda: slurm.requeue(task.id))
    if excluded:  # SLURM takes this only now that the job waits
        before = [node for state in slurm.jobs([task.id]) for node in slurm.hostnames(state.excluded)]
        _retry(lambda: slurm.exclude(task.id, sorted({*before, *excluded})))
    time.sleep(600)


def _retry(request: Callable[[], None]) -> None:
    """Asks again where SLURM's controller does not answer; raises its last UserError. Jobs of an array spread out."""
    Retrying(
        retry=retry_if_exception_type(UserError),
        wait=wait_random(4.0, 6.0),
        stop=stop_after_attempt(6),
        before_sleep=lambda state: say(f"{_error_of(state)}; once more in {state.upcoming_sleep:.1f} s"),
        reraise=True,
    )(request)


def _error_of(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


# --- a run ---


@dataclass(frozen=True)
class Run:
    """What is known of a run without its ranks."""

    dir: str
    max_steps: int

    @classmethod
    def of(cls, arguments: Sequence[str]) -> "Run":
        """The run that `imm-scale train ARGUMENT...` would train. Raises UserError."""
        config = configs.load_words(arguments).config
        return cls(config.run_dir, config.train.max_steps)

    def step(self) -> int:
        """The newest committed one, 0 if there is none."""
        from imm_scale.checkpoint.format import committed_steps

        return max(committed_steps(self.dir), default=0)

    def status(self) -> dict[str, Any]:
        """What status.json says; empty before the first start."""
        from imm_scale.checkpoint.run_folder import read_status

        return read_status(self.dir)

    def finished(self) -> bool:
        """Whether the last step is committed and the run says so."""
        return self.status().get("state") == "completed" and self.step() >= self.max_steps

    def cancelled(self, job: str) -> bool:
        """Whether the user cancelled it under this job id."""
        url = storage.join(self.dir, CANCEL)
        return storage.exists(url) and storage.read_text(url).strip() == job

    def log_folder(self, job: str) -> str:
        """For what ranks print: in the run folder, or under logs/ of the checkout where that is in an object store."""
        folder = storage.join(self.dir, "logs") if storage.is_local(self.dir) else f"logs/{job}"
        return os.path.abspath(storage.local_path(folder))


def outcome(run: Run, task: Task, ended: Ended, began: float) -> tuple[Outcome, str]:
    """How a step of a run ended, and why, by what the run folder says."""
    if run.finished():
        return "completed", "the run is complete"
    if run.cancelled(task.id):
        return "cancelled", "cancelled as asked"
    status = run.status()
    ours = status.get("time", 0.0) >= began
    if ended.code == EXIT_REFUSED:
        reason = status["reason"] if ours and status["state"] == "failed" else "see the message above"
        return "refused", f"a mistake that no restart would mend: {reason}"
    if job_owner(task) == "slurm":
        return "interrupted", "SLURM ended the job or put it back"
    if ours and status["state"] == "preempted":
        return "preempted", status.get("reason", "")
    where = f" on {ended.node}" if ended.node else ""
    # Of a killed rank only its peers can write, and they know no more than that it is gone.
    explained = ours and status["state"] == "failed" and not ended.how.startswith("killed")
    detail = f": {status['reason']}" if explained else ""
    return "failed", f"{ended.how or f'the step ended with {ended.code}'}{where}{detail}"


def supervise_run(run: Run, task: Task, command: Sequence[str]) -> int:
    """Starts a run or refuses to, and when it ends puts it back, or stops and says why. Returns the job's exit code."""
    history = History.load(run.dir, task.id)
    _close_interrupted(history, run)
    if run.finished():
        say(f"{run.dir} is complete at step {run.step()}: nothing to start")
        return _stop(history, run, "the run is complete", 0)
    verdict = history.verdict(task.max_restarts)
    if not verdict.go_on:
        return _stop(history, run, verdict.reason, 1)
    banned = sorted(set(task.nodes) & set(history.excluded()))
    if banned:
        say(f"{', '.join(banned)} failed twice: back to the queue for other nodes")
        requeue(task, history.excluded())
    start = _open(history, run, task)
    logs = run.log_folder(task.id)
    os.makedirs(logs, exist_ok=True)
    ended = run_step(command, {**os.environ, "LOGS": logs})
    _close(start, *outcome(run, task, ended, start.time), run.step())
    if start.outcome == "failed" and ended.node:
        start.failed_nodes = [ended.node]
    history.save(run.dir)
    return _after(history, run, task)


def _open(history: History, run: Run, task: Task) -> Start:
    code = snapshot.read().version
    if history.starts and history.starts[-1].code != code:
        say(f"the code is not that of the last start: {history.starts[-1].code} then, {code} now")
    start = Start(task.id, task.restart, task.nodes, run.step(), time.time(), code)
    history.starts.append(start)
    history.stopped = ""
    history.save(run.dir)
    say(f"start {len(history.of_this_job)} on {', '.join(task.nodes)}, from step {start.step} of {run.max_steps}")
    return start


def _close(start: Start, how: Outcome, reason: str, step: int) -> None:
    start.outcome, start.reason, start.end_step = how, reason, step


def _close_interrupted(history: History, run: Run) -> None:
    """Ends the start that nobody was left to end, and blames those of its nodes that are gone."""
    start = history.open
    if start is not None:
        _close(start, "interrupted", "SLURM ended the job or put it back", run.step())
    last = history.ended[-1] if history.ended else None
    if last is None or last.outcome != "interrupted" or last.failed_nodes:
        return
    last.failed_nodes = slurm.lost(last.nodes)
    if last.failed_nodes:
        last.reason = f"lost {', '.join(last.failed_nodes)}"
    say(f"start {len(history.ended)} was interrupted at step {last.end_step}: {last.reason}")


def _after(history: History, run: Run, task: Task) -> int:
    last = history.ended[-1]
    say(f"{last.outcome} at step {last.end_step} of {run.max_steps}: {last.reason}")
    if last.outcome == "completed":
        return 0
    if last.outcome == "interrupted":
        return 1  # SLURM has the job already
    verdict = history.verdict(task.max_restarts)
    if not verdict.go_on:
        return _stop(history, run, verdict.reason, 1)
    excluded = history.excluded()
    if excluded:
        say(f"from now on without {', '.join(excluded)}, where it failed twice")
    requeue(task, excluded)
    return 1


def _stop(history: History, run: Run, reason: str, code: int) -> int:
    history.stopped = reason
    history.save(run.dir)
    if code:
        say(f"stopped: {reason}")
    return code


# --- anything else ---


def supervise_command(task: Task, command: Sequence[str]) -> int:
    """Runs a command that does again only what is missing, and puts its job back when it fails."""
    logs = os.path.abspath(os.path.join("logs", task.id))
    os.makedirs(logs, exist_ok=True)
    ended = run_step(command, {**os.environ, "LOGS": logs})
    if ended.code in (0, EXIT_REFUSED):
        return ended.code
    if job_owner(task) == "slurm":
        return 1
    if task.restart >= task.max_restarts:
        say(f"stopped: failed {task.restart + 1} times, last: {ended.how or ended.code}")
        return 1
    say(f"{ended.how or f'the step ended with {ended.code}'}: back to the queue")
    requeue(task, [])
    return 1


def main(argv: Sequence[str]) -> int:
    """Returns the exit code of the batch script."""
    count = int(argv[0])
    arguments, command = argv[1 : 1 + count], argv[1 + count :]
    try:
        task = Task.of(os.environ)
        return supervise_run(Run.of(arguments), task, command) if arguments else supervise_command(task, command)
    except UserError as error:
        say(str(error))
        return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
