"""Cells of a sweep as an array of SLURM jobs, and what the queue says of them."""

import json
import os
from collections.abc import Sequence

from imm_scale import storage
from imm_scale.errors import UserError
from imm_scale.planner import estimate
from imm_scale.sweeps.definition import Cell, Sweep
from launchers import checks, slurm
from launchers.cluster import Cluster
from launchers.records import snapshot, submissions
from launchers.script import Job, script

_FOLDER = "launches"
_CELLS = "cells.json"


def job_of(sweep: Sweep, cells: Sequence[Cell], at_once: int, **options: str | int | None) -> Job:
    """The array: task i runs cell i, at most `at_once` of them at a time. Options are those of Job."""
    if at_once < 1:
        raise UserError(f"--at-once {at_once} must be at least 1")
    folder = os.path.abspath(storage.local_path(sweep.folder))
    return Job(
        kind="cell",
        tasks=tuple((folder, cell.name) for cell in cells),
        name=sweep.name,
        output=os.path.join(folder.replace("%", "%%"), "logs", "slurm-%A_%a.out"),
        array=f"0-{len(cells) - 1}%{at_once}",
        **options,  # type: ignore[arg-type]
    )


def check(sweep: Sweep, job: Job, cluster: Cluster) -> None:
    """Raises UserError for what would fail in the queue: the site's limits, or a folder that nodes do not share."""
    if not storage.is_local(sweep.folder):
        raise UserError(f"folder={sweep.folder}: a sweep's folder must be a path that all nodes share")
    checks.check(job, cluster, ask=slurm.available())
    checks.check_shared(sweep.folder, cluster)


def submit(sweep: Sweep, cells: Sequence[Cell], job: Job, cluster: Cluster) -> int:
    """Queues the array and notes which task is which cell; returns the array's id."""
    text = script(job, cluster, *snapshot.job_folders())
    folder = submissions.new_folder(sweep.folder)
    names = [cell.name for cell in cells]
    snapshot.save(folder, snapshot.read(), json.dumps(names), text)
    storage.write_text(storage.join(folder, _CELLS), json.dumps(names))
    os.makedirs(os.path.join(storage.local_path(sweep.folder), "logs"), exist_ok=True)
    number = slurm.queue(text)
    submissions.record(folder, number)
    return number


def activity(sweep: Sweep) -> dict[str, str]:
    """{cell: "queued" or "running"} of the cells that some array of this sweep still has in the queue."""
    arrays: dict[str, list[str]] = {}
    for name in storage.list_names(storage.join(sweep.folder, _FOLDER)):
        folder = storage.join(sweep.folder, _FOLDER, name)
        url = storage.join(folder, "job")
        if storage.exists(url):
            arrays[storage.read_text(url)] = json.loads(storage.read_text(storage.join(folder, _CELLS)))
    if not arrays or not slurm.available():
        return {}
    active = {}
    for job in arrays:
        for state in slurm.jobs([job]):
            number, _, task = state.id.partition("_")
            if number == job and task.isdigit() and not submissions.is_over(state):
                active[arrays[job][int(task)]] = "queued" if state.state == "PENDING" else "running"
    return active


def gpu_hours(cells: Sequence[Cell], nodes: int, gpus_per_node: int, gpu: str, link: str | None) -> estimate.Range:
    """GPU-hours of training all cells, each on so many nodes, by the planner.

    Raises:
        UserError: cells that do not fit in the GPU's memory, all of them named.
    """
    estimates = {cell.name: estimate.estimate(cell.config, nodes, gpus_per_node, gpu, link) for cell in cells}
    large = [
        f"{name} ({(e.memory.total + e.memory.reserved) / 2**30:.1f} GiB)"
        for name, e in estimates.items()
        if not e.fits
    ]
    if large:
        raise UserError(
            f"{len(large)} cells do not fit in {gpu}: {', '.join(large[:5])}; use more GPUs, a higher zero.stage, or a "
            "smaller train.micro_batch_size (`imm-scale plan` says what helps)"
        )
    hours = [e.gpu_hours for e in estimates.values()]
    return estimate.Range(sum(h.low for h in hours), sum(h.high for h in hours))
