"""`imm-scale report`."""

import argparse
import functools
import math

from imm_scale import storage
from imm_scale.commands.base import Command, say
from imm_scale.errors import UserError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN | SWEEP", help="run folders, or one sweep's folder or file")
    parser.add_argument("--out", metavar="PAGE", help="page to write; default report.html")
    parser.add_argument("--axes", metavar="PAGE", help="of runs: write this page of quality against passes and work")
    parser.add_argument("--figures", metavar="FOLDER", help="of a sweep: write its figures as files too")
    parser.add_argument("--watch", action="store_true", help="of runs: write the page anew while they train")
    parser.add_argument("--until", choices=("trained", "evaluated"), help="when --watch leaves off; default trained")
    parser.add_argument("--poll", type=float, metavar="SECONDS", help="how often --watch writes; default 30")
    parser.add_argument("--draw", action="store_true", help="with --watch: draw samples of every new checkpoint")


def _run(args: argparse.Namespace) -> int:
    _check(args)
    if args.axes is not None:
        return _axes(args)
    args.out = args.out or "report.html"
    if args.watch:
        say(f"{storage.address(args.out)} shows the runs as they train, and reloads by itself")
    from imm_scale.report import runs, sweeps

    storage.check_writable(storage.parent(args.out))  # before all is read
    if sweeps.check_single(args.runs):
        if args.watch:
            raise UserError(f"--watch is for runs, {args.runs[0]} is a sweep")
        print("\n".join(sweeps.write_report(args.runs[0], args.out, args.figures)))
    elif args.figures is not None:
        raise UserError(f"--figures {args.figures} is for a sweep, {args.runs[0]} is a run: leave it out")
    else:
        _watch(args) if args.watch else runs.write_report(args.runs, args.out)
        print(runs.table(args.runs))
    print(f"\n{args.out}")
    return 0


def _axes(args: argparse.Namespace) -> int:
    from imm_scale.report import sweeps
    from imm_scale.report.axes import page

    storage.check_writable(storage.parent(args.axes))
    if sweeps.check_single(args.runs):
        raise UserError(f"--axes is for runs, {args.runs[0]} is a sweep: give the folders of its runs")
    print("\n".join(page.write(args.runs, args.axes)))
    print(args.axes)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for flags that would do nothing."""
    idle = [flag for flag in ("out", "figures", "watch") if args.axes is not None and getattr(args, flag)]
    if idle:
        raise UserError(f"--axes {args.axes} writes that page alone: leave --{idle[0]} out")
    given = [flag for flag in ("until", "poll", "draw") if getattr(args, flag)]
    if given and not args.watch:
        raise UserError(f"--{given[0]} is for --watch: add it, or leave --{given[0]} out")
    if args.poll is not None and not (math.isfinite(args.poll) and args.poll > 0):
        raise UserError(f"--poll {args.poll:g}: give seconds above 0")


def _watch(args: argparse.Namespace) -> None:
    """Returns when the runs have ended."""
    from imm_scale import precision
    from imm_scale.parallel import world
    from imm_scale.report import progress, watch

    precision.set_tf32(False)  # but where a key allows it
    device = world.device(world.detect())
    draw = functools.partial(progress.draw_missing, device=device) if args.draw else None
    watch.watch(args.runs, args.out, args.until or "trained", draw, say, args.poll or 30.0)


REPORT = Command(
    _add_arguments,
    _run,
    """examples:
  imm-scale report runs/demo/imm runs/demo/flow_matching --out runs/demo/report.html
  imm-scale report RUN OTHER --watch --draw --until evaluated
  imm-scale report runs/* --axes axes.html
  imm-scale report sweeps/digits_scaling --out digits_scaling.html --figures docs/images/digits_scaling""",
    interrupted="nothing is half-written, the same command starts over",
)
