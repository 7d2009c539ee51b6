"""A whole study: many runs of one sweep file, on SLURM or on this machine, and one table of what they found."""

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence

from imm_scale.cli import entry
from imm_scale.errors import UserError
from imm_scale.sweeps import definition, results
from imm_scale.sweeps.definition import Cell, Sweep
from imm_scale.sweeps.results import Outcome
from launchers import array, checks, local
from launchers import cluster as clusters
from launchers.script import Job, ranks_per_node


def activity(sweep: Sweep) -> dict[str, str]:
    """{cell: "running" or "queued"} of the cells that a process or the queue has now."""
    here = {cell.name: "running" for cell in sweep.cells if local.is_running(sweep.folder, cell.name)}
    return array.activity(sweep) | here


def _outcomes(sweep: Sweep) -> list[Outcome]:
    active = activity(sweep)
    return results.outcomes(sweep, lambda cell: active.get(cell.name))


# --- plan ---


def plan_table(sweep: Sweep) -> str:
    """A line per cell: steps, images, parameters, multiply-adds; and the sums."""
    width = max(len(cell.name) for cell in sweep.cells)
    lines = [f"{'cell':<{width}} {'parameters':>12} {'steps':>9} {'images':>13} {'FLOPs':>10}"]
    for cell in sweep.cells:
        held_out = "  held out" if cell.held_out else ""
        lines.append(
            f"{cell.name:<{width}} {cell.parameters:>12,} {cell.config.train.max_steps:>9,} {cell.images:>13,} "
            f"{cell.training_flops:>10.3g}{held_out}"
        )
    total = sum(cell.training_flops for cell in sweep.cells)
    lines += ["", f"{len(sweep.cells)} cells, {total:.3g} training FLOPs in all (a multiply-add counted once)"]
    return "\n".join(lines)


def _plan(args: argparse.Namespace) -> int:
    sweep = definition.load(args.sweep)
    print(plan_table(sweep))
    print(f"folder {sweep.folder}")
    hours = _gpu_hours(sweep.cells, args)
    print(hours or "give --gpu (and --nodes, --gpus-per-node) for GPU-hours and a check of memory")
    return 0


def _gpu_hours(cells: Sequence[Cell], args: argparse.Namespace) -> str:
    """The planner's estimate in words, "" where no GPU is named. Raises UserError for cells that do not fit."""
    if args.gpu is None:
        return ""
    cluster = clusters.load(args.cluster)
    most = checks.node_range(args.nodes)[1]
    gpus = args.gpus_per_node or cluster.gpus_per_node
    hours = array.gpu_hours(cells, most, gpus, args.gpu, args.link)
    return f"{hours.low:.3g} to {hours.high:.3g} GPU-hours of training on {most} x {gpus} {args.gpu} a cell (model)"


# --- submit, retry ---


def _start(sweep: Sweep, states: Sequence[str], args: argparse.Namespace) -> int:
    outcomes = _outcomes(sweep)
    cells = [outcome.cell for outcome in outcomes if outcome.state in states]
    skipped = Counter(outcome.state for outcome in outcomes if outcome.state not in states)
    note = ", ".join(f"{count} {state}" for state, count in skipped.items())
    print(f"{len(cells)} of {len(outcomes)} cells to run" + (f" ({note})" if note else ""), file=sys.stderr)
    if not cells:
        return 0
    return _run(sweep, cells, args)


def _run(sweep: Sweep, cells: Sequence[Cell], args: argparse.Namespace) -> int:
    if args.local is None:
        return _queue(sweep, cells, args)
    unfinished = local.run(sweep, cells, args.local)
    if unfinished:
        print(f"{unfinished} cells did not finish: `status` says why, `retry` runs them again", file=sys.stderr)
    return 1 if unfinished else 0


def _job(sweep: Sweep, cells: Sequence[Cell], args: argparse.Namespace) -> Job:
    names = ("nodes", "gpus_per_node", "time", "partition", "account", "qos", "exclude")
    return array.job_of(sweep, cells, args.at_once, **{name: getattr(args, name) for name in names})


def _check(sweep: Sweep, args: argparse.Namespace) -> None:
    """What would fail in the queue, before anything is written. Raises UserError."""
    hours = _gpu_hours(sweep.cells, args)
    print(hours or "no --gpu: whether the cells fit in memory is not checked", file=sys.stderr)
    array.check(sweep, _job(sweep, sweep.cells, args), clusters.load(args.cluster))


def _queue(sweep: Sweep, cells: Sequence[Cell], args: argparse.Namespace) -> int:
    cluster = clusters.load(args.cluster)
    job = _job(sweep, cells, args)
    number = array.submit(sweep, cells, job, cluster)
    ranks = f"{job.nodes} nodes x {ranks_per_node(job, cluster)} ranks"
    print(f"job {number}: {len(cells)} cells of {ranks}, {args.at_once} at a time")
    return 0


def _refuse_idle(args: argparse.Namespace) -> None:
    """Raises UserError for options of a queue beside --local, which has none."""
    given = [name for name, default in args.of_a_queue.items() if getattr(args, name) != default]
    if args.local is not None and given:
        option = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{option} is for SLURM, and --local {args.local} runs the cells here: leave one of them out")


def _submit(args: argparse.Namespace) -> int:
    _refuse_idle(args)
    sweep = definition.load(args.sweep)
    if args.local is None:
        _check(sweep, args)
    definition.write(sweep)
    return _start(sweep, results.STARTED_BY_SUBMIT, args)


def _retry(args: argparse.Namespace) -> int:
    _refuse_idle(args)
    sweep = _submitted(args.sweep)
    if args.local is None:
        _check(sweep, args)
    return _start(sweep, results.RETRIED, args)


def _submitted(path: str) -> Sweep:
    """The sweep as its folder has it. Raises UserError if it was never submitted."""
    sweep = definition.load(path)
    if not definition.is_folder(sweep.folder):
        raise UserError(f"{sweep.folder} holds no sweep yet: submit {path} first")
    return definition.load(sweep.folder)


# --- status, collect ---


def status_table(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """A line per cell that is not simply finished, and how many are in which state."""
    width = max(len(outcome.cell.name) for outcome in outcomes)
    lines = []
    for outcome in outcomes:
        progress = f"{outcome.step:>9,} / {outcome.cell.config.train.max_steps:<9,}"
        lines.append(f"{outcome.cell.name:<{width}}  {outcome.state:<11} {progress} {outcome.reason}".rstrip())
    counts = Counter(outcome.state for outcome in outcomes)
    lines += ["", "  ".join(f"{state} {counts[state]}" for state in results.STATES if counts[state])]
    return "\n".join(lines)


def _status(args: argparse.Namespace) -> int:
    if args.watch is not None and not (math.isfinite(args.watch) and args.watch > 0):
        raise UserError(f"--watch {args.watch} must be a number of seconds above 0")
    sweep = _submitted(args.sweep)
    while True:
        outcomes = _outcomes(sweep)
        print(("\033[H\033[2J" if args.watch else "") + status_table(sweep, outcomes), flush=True)
        if not args.watch or all(outcome.state not in ("queued", "running") for outcome in outcomes):
            return 0
        time.sleep(args.watch)


def _collect(args: argparse.Namespace) -> int:
    sweep = _submitted(args.sweep)
    outcomes = _outcomes(sweep)
    url = results.collect(sweep, outcomes)
    for outcome in outcomes:
        if outcome.state != "finished":
            print(f"{outcome.cell.name}: {outcome.state}" + (f": {outcome.reason}" if outcome.reason else ""))
    warning = results.mixed_code(outcomes)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    finished = sum(outcome.state == "finished" for outcome in outcomes)
    print(f"{url}: {finished} of {len(outcomes)} cells have results")
    return 0


ACTIONS = {"plan": _plan, "submit": _submit, "status": _status, "retry": _retry, "collect": _collect}
main = entry("sweep")

if __name__ == "__main__":
    sys.exit(main())
