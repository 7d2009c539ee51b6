"""Cells of a sweep on this machine, N at a time, each in a process of its own.

A fork server pays for the imports once, so that a cell starts in milliseconds. A lock per cell keeps two commands from
running the same one.
"""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess

from tqdm import tqdm

from imm_scale import storage
from imm_scale.errors import UserError
from imm_scale.sweeps import definition, results
from imm_scale.sweeps.definition import Cell, Sweep

_PRELOAD = [
    "launchers.cell",
    "imm_scale.training.trainer",
    "imm_scale.evaluation.evaluators",
    "imm_scale.sampling.draw",
]
_POLL_SECONDS = 0.2


def _lock_path(folder: str, cell: str) -> str:
    return os.path.join(storage.local_path(folder), "locks", f"{cell}.lock")


@contextlib.contextmanager
def _locked(folder: str, cell: str) -> Iterator[bool]:
    """Holds a cell's lock; False where another process has it. The kernel lets go of it when the process dies."""
    path = _lock_path(folder, cell)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def is_running(folder: str, cell: str) -> bool:
    """Whether a process of this machine has the cell."""
    if not os.path.exists(_lock_path(folder, cell)):
        return False
    with _locked(folder, cell) as free:
        return not free


def _child(folder: str, name: str, slot: int, slots: int, log: str) -> None:
    """What the process of a cell does: settle in its slot, write to its log, run the cell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent passes it on as SIGTERM
    os.environ.update(_environment(slot, slots))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    from launchers import cell as cells

    with _locked(folder, name) as free:
        if free:
            sweep = definition.load(folder)
            sys.exit(cells.run(sweep, sweep.cell(name)))


def _environment(slot: int, slots: int) -> dict[str, str]:
    """Each slot has its share of the GPUs, or of the cores."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // slots))
    torch.set_num_threads(int(threads))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    chosen = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
    return {"OMP_NUM_THREADS": threads, **chosen}


def run(sweep: Sweep, cells: Sequence[Cell], slots: int) -> int:
    """Runs cells, `slots` at a time, with a bar or a line for each that ends.

    Returns:
        How many did not finish.
    """
    if slots < 1:
        raise UserError(f"--local {slots} must be at least 1")
    if not storage.is_local(sweep.folder):
        raise UserError(f"folder={sweep.folder}: cells run on this machine need a folder on it")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    waiting = list(cells)
    running: dict[int, tuple[Cell, BaseProcess]] = {}
    unfinished = 0
    with tqdm(total=len(cells), unit="cell", desc=sweep.name, disable=not sys.stderr.isatty()) as bar:
        try:
            while waiting or running:
                for slot in set(range(slots)) - set(running) if waiting else ():
                    if waiting:
                        running[slot] = _start(context, sweep, waiting.pop(0), slot, slots)
                time.sleep(_POLL_SECONDS)
                for slot, (cell, process) in list(running.items()):
                    if not process.is_alive():
                        del running[slot]
                        unfinished += not _settle(sweep, cell, process, bar)
        except KeyboardInterrupt:
            _stop([process for _, process in running.values()])
            raise
    return unfinished


def _start(
    context: multiprocessing.context.BaseContext, sweep: Sweep, cell: Cell, slot: int, slots: int
) -> tuple[Cell, BaseProcess]:
    folder = os.path.join(storage.local_path(sweep.folder), "logs")
    os.makedirs(folder, exist_ok=True)
    args = (sweep.folder, cell.name, slot, slots, os.path.join(folder, f"{cell.name}.log"))
    process = context.Process(target=_child, args=args, name=cell.name)  # type: ignore[attr-defined]
    process.start()
    return cell, process


def _settle(sweep: Sweep, cell: Cell, process: BaseProcess, bar: tqdm) -> bool:
    """Says what became of a cell whose process has ended; whether it is finished."""
    record = results.read_state(sweep.folder, cell.name)
    if process.exitcode == 1 and record.get("state") == "running":
        results.write_state(sweep.folder, cell.name, "failed", "an error: see its log", code=record.get("code", ""))
        record = results.read_state(sweep.folder, cell.name)
    outcome = results.outcome(sweep, cell)
    bar.update()
    line = f"{cell.name}: {outcome.state}" + (f": {outcome.reason}" if outcome.reason else "")
    means = "  ".join(f"{r['steps']}: {r['mean']:.4g}" for r in outcome.results)
    bar.write(f"{line}  {means}".rstrip(), file=sys.stderr)
    return outcome.state == "finished"


def _stop(processes: Sequence[BaseProcess]) -> None:
    """Asks cells to commit and leave, and waits for them."""
    print(f"stopping: {len(processes)} cells commit what they have", file=sys.stderr)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()
