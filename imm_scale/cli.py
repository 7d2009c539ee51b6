"""`imm-scale COMMAND`: the commands stand in commands/table.py, and only the chosen one is imported.

Exit codes: 0 done, 2 the user's mistake (a message, no traceback), 75 preempted and resumable, 130 interrupted from the
keyboard, 1 anything else.
"""

import argparse
import io
import os
import re
import sys
from collections.abc import Callable, Sequence

from imm_scale.commands.base import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR
from imm_scale.commands.table import make_parser
from imm_scale.errors import RunError, UserError

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_PREEMPTED", "EXIT_USER_ERROR", "entry", "main"]

EXIT_INTERRUPTED = 130


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; words after "--" are the command's, whatever they look like."""
    end = argv.index("--") if "--" in argv else len(argv)
    before, after = argv[:end], argv[end + 1 :]
    parser = make_parser(before[:1])
    args, rest = parser.parse_known_args(before)
    # argparse takes positionals in one run only: those after a flag are left over.
    if any(arg.startswith("-") for arg in rest) or ((rest or after) and not hasattr(args, "positionals")):
        getattr(args, "refuse", parser.error)(f"unrecognized arguments: {' '.join(rest or after)}")
    if rest or after:
        args.positionals = [*args.positionals, *rest, *after]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher inserts --local_rank=N; ranks come from the environment.
    argv = [arg for arg in argv if not re.fullmatch(r"--local[_-]rank=\d+", arg)]
    args = _parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a class may be called what this terminal cannot show
    try:
        code: int = args.action(args)
    except (UserError, RunError) as error:
        print(f"imm-scale {args.command}: {_rank()}{error}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
    except KeyboardInterrupt:
        print(f"imm-scale {args.command}: interrupted; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def _rank() -> str:
    """Whose message it is, where it is not rank 0's."""
    if "RANK" not in os.environ:
        return ""
    from imm_scale.parallel import world

    rank = world.detect().rank
    return f"[rank {rank}] " if rank else ""


def entry(command: str) -> Callable[..., int]:
    """`main` of one command, for `python -m` of the module that does its work."""
    return lambda argv=None: main([command, *(sys.argv[1:] if argv is None else argv)])
