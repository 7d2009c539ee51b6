"""The text that sbatch gets: a pure function of a job and a site.

The text holds only what differs from job to job: #SBATCH lines, the site's settings and the arguments. It ends by
sourcing launchers/KIND.sbatch, which does the work and can be submitted by hand as well.
"""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from imm_scale.errors import UserError
from launchers.cluster import Cluster

Kind = Literal["train", "encode", "evaluate", "cell"]


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM; None leaves a choice to the site.

    Attributes:
        kind: the script that does the work, launchers/KIND.sbatch.
        tasks: its arguments: one tuple for a single job, or for an array whose tasks all get the same; else one tuple
            for each index, task i getting tasks[i].
        name: job name; odd characters are replaced.
        nodes: a number, or a range as in "4-8": SLURM starts the job with as many as it can get.
        gpus_per_node, ranks_per_node: None takes the site's.
        array: indices and bound of concurrency as sbatch takes them, as in "0-63%8" or "3,7%2".
        output: file for what the first node prints, with SLURM's patterns (%j, %A_%a); other % must be doubled.
        grace_seconds: how long before the time limit all ranks are told to commit and stop.
        max_restarts: restarts after failures; preemptions and time limits after which the run went on are free.
    """

    kind: Kind
    tasks: tuple[tuple[str, ...], ...]
    name: str
    output: str
    nodes: str = "1"
    gpus_per_node: int | None = None
    ranks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    array: str | None = None
    dependency: str | None = None
    exclude: str | None = None
    launch: str | None = None
    grace_seconds: int | None = None
    max_restarts: int = 10


def quote(word: str) -> str:
    """A word as bash reads it back, on one line whatever is in it: sbatch reads scripts by lines and refuses CR LF."""
    if not any(ord(character) < 32 or ord(character) == 127 for character in word):
        return shlex.quote(word)
    escapes = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", "'": "\\'"}
    body = "".join(escapes.get(c, f"\\x{ord(c):02x}" if ord(c) < 32 or ord(c) == 127 else c) for c in word)
    return f"$'{body}'"


def ranks_per_node(job: Job, cluster: Cluster) -> int:
    """Processes on each node: as asked for, else one per GPU asked for, else the site's."""
    return job.ranks_per_node or job.gpus_per_node or cluster.ranks_per_node or cluster.gpus_per_node or 1


def script(job: Job, cluster: Cluster, folder: str, code: str | None = None) -> str:
    """The whole text for sbatch.

    Args:
        folder: absolute path the job runs in, the same on all nodes: the source tree, or any where code is given.
        code: absolute path of the folder that holds an installed launchers/; None: the source tree's own.

    Raises:
        UserError: a value that cannot stand in an #SBATCH line.
    """
    if not job.tasks:
        raise UserError("a job needs at least one task")
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(job, cluster)),
        "",
        f"cd {quote(folder)} || exit 1",
        *cluster.setup,
        *(f"export {name}={quote(value)}" for name, value in _environment(job, cluster).items()),
        f"SRUN_OPTIONS=({_quoted(cluster.srun)})",
        f"WRAP=({_quoted(cluster.wrap)})",
        *_arguments(job.tasks),
        *([f"IMM_CODE={quote(code)}"] if code else []),
        f"source {quote(os.path.join(code or '', 'launchers', f'{job.kind}.sbatch'))}",
    ]
    return "\n".join(lines) + "\n"


def job_name(name: str) -> str:
    """A name that squeue, file names and regular expressions can bear."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-")[:64] or "imm"


def _options(job: Job, cluster: Cluster) -> Iterator[str]:
    gpus = cluster.gpus_per_node if job.gpus_per_node is None else job.gpus_per_node
    values = {
        "job-name": job_name(job.name),
        "nodes": job.nodes,
        "gpus-per-node": f"{cluster.gpu_type}:{gpus}" if cluster.gpu_type else str(gpus),
        **_tasks_and_cpus(job, cluster),
        "mem": cluster.memory,
        "time": job.time or cluster.time,
        "partition": job.partition or cluster.partition,
        "account": job.account or cluster.account,
        "qos": job.qos or cluster.qos,
        "array": job.array,
        "dependency": job.dependency,
        "exclude": job.exclude,
        "output": job.output,
        "signal": f"USR1@{job.grace_seconds or cluster.grace_seconds}",
    }
    if gpus == 0:
        del values["gpus-per-node"]
    for name, value in values.items():
        if value is not None:
            yield f"--{name}={_in_header(name, value)}"
    yield "--requeue"
    yield "--open-mode=append"
    yield from cluster.sbatch


def _tasks_and_cpus(job: Job, cluster: Cluster) -> dict[str, str]:
    """Of a range of nodes SLURM takes no more than the tasks fill that it counts for the least of them; so there a
    node is one task with the CPUs of all its ranks. environment.sh starts the ranks either way."""
    ranks, cpus = ranks_per_node(job, cluster), job.cpus_per_task or cluster.cpus_per_task
    if "-" in job.nodes:
        return {"cpus-per-task": str(ranks * (cpus or 1))}
    return {"ntasks-per-node": str(ranks), **({"cpus-per-task": str(cpus)} if cpus else {})}


def _in_header(name: str, value: str) -> str:
    if any(ord(character) < 32 or character == "\\" for character in value):
        raise UserError(f"{name} {value!r} has a line break or a backslash, which #SBATCH lines cannot hold: rename it")
    return shlex.quote(value)


def _environment(job: Job, cluster: Cluster) -> dict[str, str]:
    return {
        **cluster.environment,
        "LAUNCH": job.launch or cluster.launch,
        "RANKS_PER_NODE": str(ranks_per_node(job, cluster)),
        "CPUS_PER_RANK": str(job.cpus_per_task or cluster.cpus_per_task or 1),
        "MAX_RESTARTS": str(job.max_restarts),
    }


def _quoted(arguments: Sequence[str]) -> str:
    return " ".join(quote(argument) for argument in arguments)


def _arguments(tasks: Sequence[Sequence[str]]) -> Iterator[str]:
    """Positional parameters for the sourced script, by index where the tasks of an array differ."""
    if len(tasks) == 1:
        yield f"set -- {_quoted(tasks[0])}"
        return
    yield 'case "$SLURM_ARRAY_TASK_ID" in'
    for index, arguments in enumerate(tasks):
        yield f"  {index}) set -- {_quoted(arguments)} ;;"
    yield '  *) echo "no task $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;'
    yield "esac"
