"""One cell of a sweep: train it, measure it, draw its samples; every part goes on where it stopped.

python -m launchers.cell sweeps/digits_scaling w32-flops1e11-seed0
torchrun --nproc-per-node 2 -m launchers.cell sweeps/digits_scaling --index 3
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from imm_scale import cli
from imm_scale.checkpoint import run_folder
from imm_scale.errors import UserError
from imm_scale.parallel import world
from imm_scale.sweeps import definition, results
from imm_scale.sweeps.definition import Cell, Sweep
from launchers import snapshot


def run(found: Sweep, cell: Cell) -> int:
    """Runs a cell on every rank and returns the exit code of the first part that did not end with 0.

    Its state is written by rank 0: running, then finished, preempted, diverged (not measured then) or failed.
    """
    main = world.detect().is_main
    began, code = time.time(), snapshot.read().version

    def say(state: str, reason: str = "") -> None:
        if main:
            here = {"host": world.hostname(), "pid": os.getpid(), "seconds": time.time() - began}
            results.write_state(found.folder, cell.name, state, reason, code=code, **here)

    say("running")
    try:
        outcome = _parts(found, cell)
    except (ValueError, RuntimeError, OSError) as error:
        say("failed", f"{type(error).__name__}: {error}")
        raise
    state, reason = outcome
    say(state, reason)
    return {"finished": 0, "diverged": 0, "preempted": cli.EXIT_PREEMPTED}.get(state, cli.EXIT_USER_ERROR)


def _parts(found: Sweep, cell: Cell) -> tuple[str, str]:
    """(state, reason) after the last part that ran."""
    exit_code = cli.main(["train", definition.config_url(found.folder, cell.name), f"run.dir={cell.run_dir}"])
    if exit_code == cli.EXIT_PREEMPTED:
        return "preempted", "a signal asked the run to stop"
    if exit_code != 0:
        return "failed", run_folder.read_status(cell.run_dir).get("reason", "training was refused: see its log")
    reason = results.divergence(run_folder.read_metrics(cell.run_dir))
    if reason:
        return "diverged", reason
    for part in ("evaluate", "sample"):
        if cli.main([part, cell.run_dir]) != 0:
            return "failed", f"{part} was refused: see its log"
    return "finished", ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one cell of a sweep; its exit code is the command's."""
    parser = argparse.ArgumentParser("launchers.cell", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="the sweep's folder, as `submit` made it")
    parser.add_argument("cell", nargs="?", help="the cell's name")
    parser.add_argument("--index", type=int, help="the cell's place in the sweep instead, for arrays")
    args = parser.parse_args(argv)
    try:
        found = definition.load(args.folder)
        if (args.cell is None) == (args.index is None):
            raise UserError("give a cell by its name, or by --index, and not by both")
        if args.cell is None and not 0 <= args.index < len(found.cells):
            raise UserError(f"--index {args.index}: the sweep has cells 0 to {len(found.cells) - 1}")
        cell = found.cells[args.index] if args.cell is None else found.cell(args.cell)
        return run(found, cell)
    except UserError as error:
        print(f"launchers.cell: {error}", file=sys.stderr)
        return cli.EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
