"""`imm-scale report`."""

import argparse

from imm_scale.commands.base import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN | SWEEP", help="run folders, or one sweep's folder or file")
    parser.add_argument("--out", default="report.html", help="page to write")
    parser.add_argument("--figures", metavar="FOLDER", help="of a sweep: write its figures as files too")


def _run(args: argparse.Namespace) -> int:
    from imm_scale import storage
    from imm_scale.report import runs, sweeps

    storage.check_writable(storage.parent(args.out))  # before all is read
    if sweeps.check_single(args.runs):
        print("\n".join(sweeps.write_report(args.runs[0], args.out, args.figures)))
    else:
        runs.write_report(args.runs, args.out)
        print(runs.table(args.runs))
    print(f"\n{args.out}")
    return 0


REPORT = Command(
    _add_arguments,
    _run,
    """examples:
  imm-scale report runs/demo/imm runs/demo/flow_matching --out runs/demo/report.html
  imm-scale report sweeps/digits_scaling --out digits_scaling.html --figures docs/images/digits_scaling""",
    interrupted="nothing is half-written, the same command starts over",
)
