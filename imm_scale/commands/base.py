"""What a command of `imm-scale` is, and what several of them share. Imports no torch: `--help` has to be quick."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from imm_scale.errors import UserError

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75


@dataclass(frozen=True)
class Command:
    """One command. Its module is imported to parse its words or show its help; `run` imports what does the work.

    Attributes:
        add_arguments: gives its parser the arguments.
        run: does the work and returns the exit code.
        examples: what `--help` says below the arguments, command lines first.
        description: what `--help` says above them; "" for the line of `imm-scale --help`.
        interrupted: what Ctrl-C leaves, and what to do then.
        check: what `run` checks before it reads or writes; jobs are checked by it before they wait in a queue.
    """

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    examples: str
    description: str = ""
    interrupted: str = "the same command goes on"
    check: Callable[[argparse.Namespace], None] | None = None


def add_config_args(parser: argparse.ArgumentParser) -> None:
    """The arguments `config.load_words` reads."""
    parser.add_argument(
        "positionals",
        nargs="*",
        metavar="RECIPE | FILE.yaml | key=value",
        help="names of recipes that come along, YAML files of your own, then dotted overrides",
    )


def numbers(text: str | None, flag: str) -> tuple[float, ...]:
    """The numbers of "1,1.5,2"; none for None. Raises UserError."""
    try:
        return () if text is None else tuple(float(item) for item in text.split(","))
    except ValueError as error:
        raise UserError(f"{flag} {text}: give numbers, as in 1,1.5,2") from error


def say(line: str) -> None:
    """Prints a line at once, whatever stdout is."""
    print(line, flush=True)
