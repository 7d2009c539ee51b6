"""How a submitted run is doing, and how to end it: `imm-scale status`, `logs` and `cancel`."""

import os
import time
from collections.abc import Iterator

from imm_scale import storage
from imm_scale.errors import UserError
from launchers import slurm
from launchers.records import submissions
from launchers.records.history import History
from launchers.supervise import CANCEL


def status(run_dir: str) -> str:
    """The job, the run and its starts in a few lines. Raises UserError."""
    from imm_scale.checkpoint.format import committed_steps
    from imm_scale.checkpoint.run_folder import read_metrics, read_status
    from imm_scale.checkpoint.run_lock import owner_of

    job = submissions.job_of(run_dir)
    run, history, state = read_status(run_dir), History.load(run_dir, str(job)), submissions.state_of(job)
    lines = [f"job        {job}  {_job(state)}"]
    summary = "  ".join(str(run[key]) for key in ("state", "reason") if run.get(key))
    lines.append(f"run        {summary or 'not started yet'}")
    owner = owner_of(run_dir)
    if owner is not None and owner.process.state() != "dead":
        lines.append(f"locked by  {owner}")
    lines.append(f"committed  step {max(committed_steps(run_dir), default=0)}")
    records = read_metrics(run_dir)
    if records:
        last = records[-1]
        speed = f"{last['images_per_second']:.0f} images/s, {time.time() - last['time']:.0f} s ago"
        lines.append(f"last       step {last['step']}  loss {last['loss']:.5g}  {speed}")
    for number, start in enumerate(history.of_this_job, 1):
        end = f"{start.outcome} at step {start.end_step}: {start.reason}" if start.outcome else "running"
        lines.append(f"start {number:<4} from step {start.step} on {','.join(start.nodes)}: {end}")
    if history.excluded():
        lines.append(f"excluded   {', '.join(history.excluded())}: failed twice")
    if history.stopped:
        lines.append(f"stopped    {history.stopped}")
    return "\n".join(lines)


def _job(state: slurm.JobState | None) -> str:
    if state is None:
        return "SLURM has forgotten it"
    return f"{state.state}  {state.nodes or state.reason}"


def cancel(run_dir: str, now: bool) -> str:
    """Ends a run's job: its ranks commit first, unless it waits or `now`. Returns what was done."""
    job = submissions.job_of(run_dir)
    state = submissions.state_of(job)
    if submissions.is_over(state):
        return f"job {job} is over already"
    assert state is not None
    storage.write_text(storage.join(run_dir, CANCEL), str(job))
    if now or state.state != "RUNNING":
        slurm.cancel(job)
        return f"job {job} is cancelled"
    slurm.signal_ranks(job, "USR1")
    return f"job {job} commits a checkpoint and stops; --now ends it at once"


def log_file(run_dir: str, rank: int | None) -> str:
    """Of the last job: what the first node and rank 0 print, or what another rank prints.

    Raises:
        UserError: there is none.
    """
    folder = storage.join(storage.local_path(run_dir), "logs") if storage.is_local(run_dir) else "logs"
    name = f"slurm-{submissions.job_of(run_dir)}.out" if not rank else f"rank-{rank:05d}.log"
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        files = ", ".join(sorted(os.listdir(folder))) if os.path.isdir(folder) else "nothing"
        raise UserError(f"{path} is not there yet; there is {files}")
    return path


def lines(path: str, follow: bool) -> Iterator[str]:
    """The lines of a file, and with `follow` those that come."""
    with open(path, errors="replace") as file:
        while True:
            line = file.readline()
            if line:
                yield line
            elif follow:
                time.sleep(0.5)
            else:
                return
