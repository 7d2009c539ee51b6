"""A whole study: many runs of one sweep file, on SLURM or on this machine, and one table of what they found.

python -m launchers.sweep plan    configs/sweep/digits_scaling.yaml
python -m launchers.sweep submit  configs/sweep/digits_scaling.yaml --local 2
python -m launchers.sweep status  configs/sweep/digits_scaling.yaml
python -m launchers.sweep retry   configs/sweep/digits_scaling.yaml --local 2
python -m launchers.sweep collect configs/sweep/digits_scaling.yaml
imm-scale report sweeps/digits_scaling --out digits_scaling.html
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence

from imm_scale.errors import UserError
from imm_scale.scaling import results, sweep
from imm_scale.scaling.results import Outcome
from imm_scale.scaling.sweep import Cell, Sweep
from launchers import local


def activity(found: Sweep) -> dict[str, str]:
    """{cell: "running" or "queued"} of the cells that a process or the queue has now."""
    return {cell.name: "running" for cell in found.cells if local.is_running(found.folder, cell.name)}


def _outcomes(found: Sweep) -> list[Outcome]:
    active = activity(found)
    return results.outcomes(found, lambda cell: active.get(cell.name))


# --- plan ---


def plan_table(found: Sweep) -> str:
    """A line per cell: steps, images, parameters, multiply-adds; and the sums."""
    width = max(len(cell.name) for cell in found.cells)
    lines = [f"{'cell':<{width}} {'parameters':>12} {'steps':>9} {'images':>13} {'FLOPs':>10}"]
    for cell in found.cells:
        held = "  held out" if cell.held_out else ""
        lines.append(
            f"{cell.name:<{width}} {cell.parameters:>12,} {cell.config.train.max_steps:>9,} {cell.images:>13,} "
            f"{cell.training_flops:>10.3g}{held}"
        )
    total = sum(cell.training_flops for cell in found.cells)
    lines += ["", f"{len(found.cells)} cells, {total:.3g} training FLOPs in all (a multiply-add counted once)"]
    return "\n".join(lines)


def _plan(args: argparse.Namespace) -> int:
    found = sweep.load(args.sweep)
    print(plan_table(found))
    print(f"folder {found.folder}")
    return 0


# --- submit, retry ---


def _start(found: Sweep, states: Sequence[str], args: argparse.Namespace) -> int:
    known = _outcomes(found)
    cells = [one.cell for one in known if one.state in states]
    kept = Counter(one.state for one in known if one.state not in states)
    note = ", ".join(f"{count} {state}" for state, count in kept.items())
    print(f"{len(cells)} of {len(known)} cells to run" + (f" ({note})" if note else ""), file=sys.stderr)
    if not cells:
        return 0
    return _run(found, cells, args)


def _run(found: Sweep, cells: Sequence[Cell], args: argparse.Namespace) -> int:
    if args.local is None:
        raise UserError("give --local N to run N cells at a time on this machine")
    unfinished = local.run(found, cells, args.local)
    if unfinished:
        print(f"{unfinished} cells did not finish: `status` says why, `retry` runs them again", file=sys.stderr)
    return 1 if unfinished else 0


def _submit(args: argparse.Namespace) -> int:
    found = sweep.load(args.sweep)
    sweep.write(found)
    return _start(found, results.STARTED_BY_SUBMIT, args)


def _retry(args: argparse.Namespace) -> int:
    return _start(_submitted(args.sweep), results.RETRIED, args)


def _submitted(path: str) -> Sweep:
    """The sweep as its folder has it. Raises UserError if it was never submitted."""
    found = sweep.load(path)
    if not sweep.is_folder(found.folder):
        raise UserError(f"{found.folder} holds no sweep yet: submit {path} first")
    return sweep.load(found.folder)


# --- status, collect ---


def status_table(found: Sweep, known: Sequence[Outcome]) -> str:
    """A line per cell that is not simply finished, and how many are in which state."""
    width = max(len(one.cell.name) for one in known)
    lines = []
    for one in known:
        progress = f"{one.step:>9,} / {one.cell.config.train.max_steps:<9,}"
        lines.append(f"{one.cell.name:<{width}}  {one.state:<11} {progress} {one.reason}".rstrip())
    counts = Counter(one.state for one in known)
    lines += ["", "  ".join(f"{state} {counts[state]}" for state in results.STATES if counts[state])]
    return "\n".join(lines)


def _status(args: argparse.Namespace) -> int:
    found = _submitted(args.sweep)
    while True:
        known = _outcomes(found)
        print(("\033[H\033[2J" if args.watch else "") + status_table(found, known), flush=True)
        if not args.watch or all(one.state not in ("queued", "running") for one in known):
            return 0
        time.sleep(args.watch)


def _collect(args: argparse.Namespace) -> int:
    found = _submitted(args.sweep)
    known = _outcomes(found)
    url = results.collect(found, known)
    for one in known:
        if one.state != "finished":
            print(f"{one.cell.name}: {one.state}" + (f": {one.reason}" if one.reason else ""))
    warning = results.mixed_code(known)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    finished = sum(one.state == "finished" for one in known)
    print(f"{url}: {finished} of {len(known)} cells have results")
    return 0


# --- command line ---


def _parser() -> argparse.ArgumentParser:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m launchers.sweep",
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action, help in (
        ("plan", _plan, "print the cells and what they cost; nothing is written"),
        ("submit", _submit, "start the cells that are missing or were interrupted; again and again, if you like"),
        ("status", _status, "print the state of every cell"),
        ("retry", _retry, "start the cells that failed or were interrupted, and no others"),
        ("collect", _collect, "write results.parquet, with the cells that have no results listed"),
    ):
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("sweep", metavar="SWEEP", help="a sweep file (*.yaml), or the folder it went to")
        command.set_defaults(action=action)
        if name in ("submit", "retry"):
            command.add_argument("--local", type=int, metavar="N", help="run N cells at a time on this machine")
        if name == "status":
            command.add_argument("--watch", type=float, metavar="SECONDS", help="print it again and again until done")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 cells did not finish, 2 the user's mistake, 130 Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        return args.action(args)
    except UserError as error:
        print(f"launchers.sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("launchers.sweep: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
