"""One cell of a sweep: train it, measure it, draw its samples; every part goes on where it stopped.

python -m launchers.cell sweeps/digits_scaling w32-flops1e11-seed0
torchrun --nproc-per-node 2 -m launchers.cell sweeps/digits_scaling --index 3
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from imm_scale import config as configs
from imm_scale import precision
from imm_scale.checkpoint import run_folder
from imm_scale.commands.base import EXIT_PREEMPTED, EXIT_USER_ERROR, say
from imm_scale.errors import RunError, UserError, explain_os_error
from imm_scale.evaluation import command
from imm_scale.parallel import world
from imm_scale.sampling import job
from imm_scale.sampling import source as sources
from imm_scale.sweeps import definition, results
from imm_scale.sweeps.definition import Cell, Sweep
from imm_scale.training import trainer
from launchers.records import snapshot


def run(sweep: Sweep, cell: Cell) -> int:
    """Runs a cell on every rank and returns the exit code of the first part that did not end with 0.

    Its state is written by rank 0: running, then finished, preempted, diverged (not measured then) or failed.
    """
    main = world.detect().is_main
    began, code = time.time(), snapshot.read().version

    def note(state: str, reason: str = "") -> None:
        if main:
            here = {"host": world.hostname(), "pid": os.getpid(), "seconds": time.time() - began}
            results.write_state(sweep.folder, cell.name, state, reason, code=code, **here)

    note("running")
    try:
        outcome = _parts(sweep, cell)
    except (ValueError, RuntimeError, OSError) as error:
        note("failed", f"{type(error).__name__}: {error}")
        raise
    world.shutdown()
    state, reason = outcome
    note(state, reason)
    return {"finished": 0, "diverged": 0, "preempted": EXIT_PREEMPTED}.get(state, EXIT_USER_ERROR)


def _parts(sweep: Sweep, cell: Cell) -> tuple[str, str]:
    """(state, reason) after the last part that ran."""
    for name, part in (("train", _train), ("evaluate", _evaluate), ("sample", _sample)):
        try:
            ended = part(sweep, cell)
        except (UserError, RunError) as error:
            print(f"launchers.cell: {name}: {error}", file=sys.stderr)
            return "failed", f"{name}: {error}"
        if ended is not None:
            return ended
    return "finished", ""


def _train(sweep: Sweep, cell: Cell) -> tuple[str, str] | None:
    """How the cell ends here, None where it goes on to be measured."""
    config = configs.load([definition.config_url(sweep.folder, cell.name)], [f"run.dir={cell.run_dir}"]).config
    if trainer.train(config) == "preempted":
        return "preempted", "a signal asked the run to stop"
    reason = results.divergence(run_folder.read_metrics(cell.run_dir))
    return ("diverged", reason) if reason else None


def _evaluate(sweep: Sweep, cell: Cell) -> None:
    precision.set_tf32(False)  # but where a key allows it
    command.run(command.Arguments(cell.run_dir), [], world.detect(), say)


def _sample(sweep: Sweep, cell: Cell) -> None:
    source = sources.find(cell.run_dir)
    config = sources.config_of(source, [], ()).sampling
    job.run(source, config, job.Request(None, (config.guidance_scale,)), world.detect(), say)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one cell of a sweep; its exit code is the command's."""
    parser = argparse.ArgumentParser("launchers.cell", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="the sweep's folder, as `submit` made it")
    parser.add_argument("cell", nargs="?", help="the cell's name")
    parser.add_argument("--index", type=int, help="the cell's place in the sweep instead, for arrays")
    args = parser.parse_args(argv)
    try:
        sweep = definition.load(args.folder)
        if (args.cell is None) == (args.index is None):
            raise UserError("give a cell by its name, or by --index, and not by both")
        if args.cell is None and not 0 <= args.index < len(sweep.cells):
            raise UserError(f"--index {args.index}: the sweep has cells 0 to {len(sweep.cells) - 1}")
        cell = sweep.cells[args.index] if args.cell is None else sweep.cell(args.cell)
        return run(sweep, cell)
    except UserError as error:
        print(f"launchers.cell: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        print(f"launchers.cell: {explained}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
