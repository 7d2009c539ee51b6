"""`imm-scale COMMAND`: the commands stand in commands/table.py, and only the chosen one is imported.

Exit codes: 0 done, 2 the user's mistake (a message, no traceback), 75 preempted and resumable, 130 interrupted from the
keyboard, 1 anything else.
"""

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Sequence

from imm_scale.commands.base import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR
from imm_scale.commands.table import make_parser
from imm_scale.errors import RunError, UserError, explain_os_error

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_PREEMPTED", "EXIT_USER_ERROR", "entry", "main", "parse"]

EXIT_INTERRUPTED = 130
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ENFILE)  # what a restart may mend, so that launchers try one


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; words after "--" are the command's, whatever they look like. Exits with 2 for wrong ones."""
    end = argv.index("--") if "--" in argv else len(argv)
    before, after = argv[:end], argv[end + 1 :]
    parser = make_parser(before[:1])
    args, rest = parser.parse_known_args([_with_home(arg) for arg in before])
    for arg in before:
        if "${" in arg and (arg.startswith("-") or "=" not in arg):  # keys of a config may refer to others
            getattr(args, "refuse", parser.error)(f"{arg}: ${{...}} is the shell's to replace: leave out single quotes")
    for key, value in vars(args).items():
        flag = f"--{key.replace('_', '-')}"
        if value == "" and any(arg.partition("=")[0] == flag for arg in before):  # --out "$FOLDER" without a FOLDER
            getattr(args, "refuse", parser.error)(f"{flag} is empty: give a value, or leave {flag} out")
    # argparse takes positionals in one run only: those after a flag are left over.
    hint = getattr(args, "hint", "")
    if any(arg.startswith("-") for arg in rest) or ((rest or after) and not hasattr(args, "positionals")):
        getattr(args, "refuse", parser.error)(f"unrecognized arguments: {' '.join(rest or after)}{hint}")
    if rest or after:
        args.positionals = [*args.positionals, *rest, *after]
    return args


def _with_home(arg: str) -> str:
    """--out=~/x as --out ~/x, in which the shell knows the home."""
    flag, equals, value = arg.partition("=")
    return f"{flag}={os.path.expanduser(value)}" if flag.startswith("--") and equals else arg


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher inserts --local_rank=N; ranks come from the environment.
    argv = [arg for arg in argv if not re.fullmatch(r"--local[_-]rank=\d+", arg)]
    args = parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a class may be called what this terminal cannot show
    try:
        code: int = args.action(args)
        sys.stdout.flush()
    except (UserError, RunError) as error:
        return _say(args, error)
    except BrokenPipeError:
        # Whoever read has gone, as `head` does; what is left in the buffer must go somewhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        return _say(args, RunError(str(explained)) if error.errno in _TRANSIENT else explained)
    except KeyboardInterrupt:
        print(f"imm-scale {args.command}: interrupted; {args.interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def _say(args: argparse.Namespace, error: Exception) -> int:
    print(f"imm-scale {args.command}: {_rank()}{error}", file=sys.stderr)
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED


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
