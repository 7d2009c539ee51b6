"""The SLURM cluster of the tests: what can be done to its nodes, and what became of a job."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LAB = Path(__file__).parent / "lab"
NODES = ("node1", "node2", "node3", "node4")
# Starting four ranks takes half a minute on two busy cores, and SLURM's own patience comes on top.
PATIENCE = 420.0


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def until(what: str, true: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Waits until something is so. Raises AssertionError."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(0.2)


@dataclass(frozen=True)
class Process:
    """A process of a job's step, as its environment tells."""

    pid: int
    node: str
    rank: int
    task: str

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def ranks_of(job: int, module: str = "imm_scale") -> list[Process]:
    """The Python processes of a job's ranks, of all its array tasks."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            argv = (folder / "cmdline").read_bytes().split(b"\0")
            env = dict(pair.split(b"=", 1) for pair in (folder / "environ").read_bytes().split(b"\0") if b"=" in pair)
        except OSError:
            continue  # it has ended
        of_job = {env.get(name, b"").decode() for name in (b"SLURM_JOB_ID", b"SLURM_ARRAY_JOB_ID")}
        if str(job) in of_job and argv[:3] == [b"python", b"-m", module.encode()]:
            names = (b"SLURMD_NODENAME", b"SLURM_PROCID", b"SLURM_ARRAY_TASK_ID")
            node, rank, task = (env.get(name, b"").decode() for name in names)
            processes.append(Process(int(folder.name), node, int(rank), task))
    return processes


class Cluster:
    """Four nodes, all well when a test gets them."""

    def __init__(self, folder: str):
        self.folder = folder

    def mend(self) -> None:
        """No jobs, all nodes up."""
        jobs = run("squeue", "-h", "-o", "%A").split()
        if jobs:
            run("scancel", *sorted(set(jobs)))
        for node in NODES:
            run("ip", "link", "set", f"vh-{node}", "up")
        subprocess.run([LAB / "up.sh"], env={**os.environ, "LAB": self.folder}, capture_output=True, check=False)
        for node in NODES:
            if self.node_state(node).startswith(("down", "drain")):
                run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        until("all nodes are idle", lambda: all(self.node_state(node) == "idle" for node in NODES))

    def node_state(self, node: str) -> str:
        return run("sinfo", "-h", "-n", node, "-o", "%T")

    def state(self, job: int) -> str:
        """Of a job, or of all tasks of an array if they agree."""
        return " ".join(sorted(set(run("squeue", "-h", "--states=all", "-j", str(job), "-o", "%T").split())))

    def wait(self, job: int, state: str = "COMPLETED") -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(f"job {job} is over", lambda: set(self.state(job).split()) <= set(over))
        assert self.state(job) == state

    def set_down(self, node: str) -> None:
        run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def cut_off(self, node: str) -> None:
        run("ip", "link", "set", f"vh-{node}", "down")

    def kill_everything(self, node: str) -> None:
        """All processes of the node, slurmd among them."""
        for pid in run("ip", "netns", "pids", node).split():
            os.kill(int(pid), signal.SIGKILL)
