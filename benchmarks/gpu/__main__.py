"""`python -m benchmarks.gpu --out DIR`: every GPU path, proven and timed, in some ten to twenty minutes on one H100.

Exit codes: 0 every section came to its end and every check holds; 1 not so; 2 there is no GPU, or a wrong argument.
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import abilities, machine, runner, table
from benchmarks.gpu.report import Context
from benchmarks.gpu.sections import GROUPS, SECTIONS, Section


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if args.list:
        print("\n".join(f"{section.name:<14} {section.limit:>3} s  {section.what}" for section in SECTIONS))
        return 0
    if args.size == "full" and not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device here; --size small runs the same code on the CPU", file=sys.stderr)
        return 2
    out, device = Path(args.out), torch.device("cpu" if args.size == "small" else "cuda")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"make gpu: --out {out}: {error}; choose another folder", file=sys.stderr)
        return 2
    os.environ["DS_ACCELERATOR"] = device.type
    if args.size == "small":
        _prepare_small()
    machine.remember_command()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no section is left behind
    results = runner.run(args.sections, Context(args.size, device, out, args.slack))
    (out / "table.md").write_text(table.markdown(results, out))
    print(table.text(results))
    return 0 if runner.succeeded(results) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/gpu", help="folder for JSON, logs and tables (default runs/gpu)")
    parser.add_argument(
        "--only",
        action="append",
        metavar="SECTION[,SECTION]",
        help="run these alone; proofs and timings name all of a kind",
    )
    parser.add_argument("--size", choices=("small", "full"), default="full", help="small: tiny nets, on the CPU")
    parser.add_argument("--slack", type=_slack, default=1.0, metavar="X", help="give each section X times its seconds")
    parser.add_argument("--list", action="store_true", help="say what sections there are")
    args = parser.parse_args(argv)
    args.sections = _chosen(parser, args.only)
    return args


def _sections_of(word: str) -> list[str]:
    return [section.name for section in GROUPS[word]] if word in GROUPS else [word]


def _slack(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1.0 <= value <= 100.0:
        raise argparse.ArgumentTypeError(f"{text} is no number between 1 and 100")
    return value


def _chosen(parser: argparse.ArgumentParser, only: Sequence[str] | None) -> list[Section]:
    words = [word for value in only or () for word in value.split(",")]
    names = [name for word in words for name in _sections_of(word)]
    available = [section.name for section in SECTIONS]
    unknown = [name for name in names if name not in available]
    if unknown:
        parser.error(f"--only {unknown[0]}: there is no such section; there are {', '.join([*GROUPS, *available])}")
    return [section for section in SECTIONS if not names or section.name in names]


def _prepare_small() -> None:
    """The CPU alone, and imports that are paid once: sections are forked from here."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    abilities.compile_without_generating()
    import deepspeed  # noqa: F401

    import imm_scale.training.trainer  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
