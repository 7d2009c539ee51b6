"""What can be said of a job before SLURM has it. All raise UserError with the remedy."""

import math
import os
import re

from imm_scale import storage
from imm_scale.errors import UserError
from launchers import slurm
from launchers.cluster import Cluster
from launchers.script import Job

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::([0-5]?\d))?(?::([0-5]?\d))?")
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%[1-9]\d*)?")

# sbatch's own: CONDITION:JOB[_TASK][+MINUTES][:...] or singleton; several by commas (all) or question marks (any)
_CONDITION = "(?:after|afterany|aftercorr|afternotok|afterok|afterburstbuffer)"
_ONE_DEPENDENCY = rf"(?:singleton|{_CONDITION}(?::\d+(?:_[\d*]+)?(?:\+\d+)?)+)"
_DEPENDENCY = re.compile(rf"{_ONE_DEPENDENCY}(?:[,?]{_ONE_DEPENDENCY})*")


def _is_array(text: str) -> bool:
    """Whether sbatch takes it for indices; those of a range ascend."""
    ranges = re.findall(r"(\d+)-(\d+)", text)
    return _ARRAY.fullmatch(text) is not None and all(int(first) <= int(last) for first, last in ranges)


def node_range(nodes: str) -> tuple[int, int]:
    """(least, most) of "4" or "4-8"."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", nodes)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise UserError(f"--nodes {nodes}: give a number of nodes, or the least and the most as in 4-8")
    return least, most


def limit_seconds(time: str) -> float:
    """A time limit as sbatch takes it: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    if time.lower() in ("infinite", "unlimited"):
        return math.inf
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time {time}: give minutes, HH:MM:SS or DAYS-HH:MM:SS, as in 90, 12:00:00 or 2-00:00:00")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    # Without days one number is minutes and two are minutes and seconds; else the first is hours.
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(count * unit for count, unit in zip(numbers, units, strict=False))


def check(job: Job, cluster: Cluster, ask: bool) -> None:
    """Options that cannot work.

    Args:
        ask: whether sinfo can be asked what there is.
    """
    _check_numbers(job, cluster)
    time, grace = job.time or cluster.time, job.grace_seconds or cluster.grace_seconds
    if time is not None and limit_seconds(time) <= grace:
        raise UserError(
            f"--time {time} is over before --grace-seconds {grace} are: give more of the one or less of the other"
        )
    if job.array is not None and not _is_array(job.array):
        raise UserError(f"--array {job.array}: give indices and the most at a time, as in 0-63%8 or 3,7%2")
    if job.dependency is not None and not _DEPENDENCY.fullmatch(job.dependency):
        raise UserError(f"--dependency {job.dependency}: give it as sbatch takes it, as in afterok:123 or singleton")
    least, _ = node_range(job.nodes)
    gpus = cluster.gpus_per_node if job.gpus_per_node is None else job.gpus_per_node
    if gpus > cluster.gpus_per_node:
        raise UserError(_too_many_gpus(gpus, f"a node of this cluster has {cluster.gpus_per_node}", cluster))
    if ask:
        _check_partition(job.partition or cluster.partition, least, gpus, cluster)


_LEAST = {
    "gpus_per_node": 0,
    "ranks_per_node": 1,
    "cpus_per_task": 1,
    "grace_seconds": 1,  # without any no rank would hear of the end
    "max_restarts": 0,
}


def _check_numbers(job: Job, cluster: Cluster) -> None:
    """Numbers that no job could have, of the command line and of the site."""
    for key, least in _LEAST.items():
        given = getattr(job, key)
        if given is not None and given < least:
            raise UserError(f"--{key.replace('_', '-')} {given} must be at least {least}")
        of_site = getattr(cluster, key, None)
        if of_site is not None and of_site < least:
            raise UserError(f"{key}={of_site} of the cluster must be at least {least}: mend its configs/cluster/*.yaml")


def _check_partition(name: str | None, least: int, gpus: int, cluster: Cluster) -> None:
    partitions = slurm.partitions()
    fitting = [partition for partition in partitions if name in (None, partition.name)]
    if not fitting:
        raise UserError(
            f"--partition {name}: there is none of this name; sinfo knows {', '.join(p.name for p in partitions)}"
        )
    most = max(partition.nodes for partition in fitting)
    if least > most:
        raise UserError(f"--nodes {least}: partition {name or 'with the most'} has {most}; ask for at most that many")
    most_gpus = max(partition.most_gpus for partition in fitting)
    if gpus > most_gpus:
        raise UserError(_too_many_gpus(gpus, f"sinfo knows nodes of at most {most_gpus}", cluster))


def _too_many_gpus(gpus: int, why: str, cluster: Cluster) -> str:
    remedy = "on a cluster of CPUs give --ranks-per-node" if cluster.gpus_per_node == 0 else "ask for more --nodes"
    return f"--gpus-per-node {gpus}: {why}; {remedy}, or set gpus_per_node in its configs/cluster/*.yaml"


def check_shared(folder: str, cluster: Cluster) -> None:
    """Refuses a folder that other nodes do not see."""
    if not storage.is_local(folder):
        return
    path = os.path.realpath(storage.local_path(folder))
    for local in cluster.local_paths:
        if os.path.commonpath([path, os.path.realpath(local)]) == os.path.realpath(local):
            raise UserError(
                f"run.dir={folder} is below {local}, which every node has for itself: choose a shared folder, or take "
                f"{local} out of local_paths in configs/cluster/*.yaml"
            )
