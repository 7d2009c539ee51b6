"""Heads that draw the tokens of a step jointly, beside a product of tokens: digits, verses and hands, on one page.

    python -m experiments.joint_tokens [--at-once 1] [--tasks digits,mnist,kjv,hands] [--scaling]

Trains every head on small token nets from three seeds, measures them by nll@L, enumerates what can be enumerated, and
measures what equal and best step sizes cost, and writes docs/joint_tokens.md and its pictures; with --scaling also a
sweep over sizes and budgets. Two hours of one CPU core in all; run again, it goes on where it was.
"""

import argparse
from pathlib import Path

from experiments import common
from experiments.joint_tokens import data, page
from experiments.joint_tokens.scaling import Scaling
from experiments.joint_tokens.study import TASKS, Study
from imm_scale.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, each on a core (default 1)")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"comma-separated, of {', '.join(TASKS)}; default all")
    parser.add_argument("--scaling", action="store_true", help="the sweep over sizes and budgets as well")
    parser.add_argument("--runs", type=Path, default=Path("runs/joint_tokens"), help="folder of the sweeps")
    parser.add_argument("--data", type=Path, default=Path("data/joint_tokens"), help="folder of the data sets")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder the page and its pictures go to")
    args = parser.parse_args()
    try:
        names = common.chosen(args.tasks, TASKS)
    except UserError as error:
        parser.error(str(error))
    studies = {name: Study(TASKS[name], args.runs, data.make(name, args.data / name)) for name in names}
    for study in studies.values():
        study.run(args.at_once)
    scaling = Scaling(args.runs, data.make("kjv", args.data / "kjv"), {}) if args.scaling else None
    if scaling is not None:
        scaling.run(args.at_once)
    print(page.write(studies, scaling, args.docs))


if __name__ == "__main__":
    main()
