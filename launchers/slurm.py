"""SLURM's own commands, one function each. All raise UserError with SLURM's words where it refuses."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from imm_scale.errors import UserError


def available() -> bool:
    """Whether this machine submits to SLURM at all."""
    return shutil.which("sbatch") is not None


def _run(command: Sequence[str], text: str | None = None) -> str:
    data = None if text is None else text.encode("utf-8", "surrogateescape")
    try:
        result = subprocess.run(list(command), input=data, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not here: run this on a machine that submits to SLURM") from error
    if result.returncode != 0:
        raise UserError(f"{command[0]}: {result.stderr.decode(errors='replace').strip()}")
    return result.stdout.decode(errors="replace").strip()


def queue(script: str) -> int:
    """Submits a script and returns the job's id (of the whole array, if it is one)."""
    return int(_run(["sbatch", "--parsable"], script).split(";")[0])


@dataclass(frozen=True)
class JobState:
    """What squeue says of a job, or of a task of an array.

    Attributes:
        id: the number, or ARRAY_TASK.
        state: PENDING, RUNNING, COMPLETING, ...; reason: why it waits, or why it ended.
        nodes: where it runs; excluded: where it must not.
    """

    id: str
    state: str
    reason: str
    nodes: str
    excluded: str


def jobs(ids: Iterable[str | int]) -> list[JobState]:
    """Those of the jobs that SLURM still keeps; the tasks of an array one by one."""
    numbers = ",".join(str(job) for job in ids)
    try:
        text = _run(["squeue", "--noheader", "--array", f"--jobs={numbers}", "--states=all", "--format=%i|%T|%r|%N|%x"])
    except UserError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    return [JobState(*line.strip().split("|")) for line in text.splitlines()]


def requeue(job: str) -> None:
    """Puts a running job back; its processes get SIGTERM, and SIGKILL a while later."""
    _run(["scontrol", "requeue", job])


def exclude(job: str, nodes: Sequence[str]) -> None:
    """Keeps a waiting job off these nodes; SLURM refuses it for a job that runs."""
    _run(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}"])


def cancel(job: str | int) -> None:
    """Cancels a job, whether it waits or runs."""
    _run(["scancel", str(job)])


def signal_ranks(job: str | int, name: str) -> None:
    """Sends a signal to all steps of a job, not to its batch script."""
    _run(["scancel", f"--signal={name}", str(job)])


def hostnames(nodes: str) -> list[str]:
    """["node1", "node2"] of "node[1-2]"; [] of nothing."""
    return _run(["scontrol", "show", "hostnames", nodes]).split() if nodes and nodes != "(null)" else []


def lost(nodes: Sequence[str]) -> list[str]:
    """Those of the nodes that are down, failing or do not answer."""
    if not nodes:
        return []
    lines = _run(["sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T"]).splitlines()
    gone = [line.split("|")[0] for line in lines if re.search(r"down|fail|\*", line.split("|")[1])]
    return sorted(set(gone))


@dataclass(frozen=True)
class Partition:
    name: str
    nodes: int
    most_gpus: int


def partitions() -> list[Partition]:
    """Partitions with how many nodes they have and the most GPUs of one node."""
    by_name: dict[str, Partition] = {}
    for line in _run(["sinfo", "--noheader", "--format=%R|%D|%G"]).splitlines():
        name, nodes, gres = line.strip().split("|")
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))
        old = by_name.get(name, Partition(name, 0, 0))
        by_name[name] = Partition(name, old.nodes + int(nodes), max(old.most_gpus, gpus))
    return list(by_name.values())
