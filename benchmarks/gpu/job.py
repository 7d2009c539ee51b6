"""A function in a fresh process: its words in a file, its imports done before its turn comes."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

Method = Literal["spawn", "fork"]


class Job:
    """Use as a context manager: leaving it ends what still runs.

    Args:
        method: `spawn` starts a new interpreter, as CUDA needs it; `fork` copies this one and what it has imported.
        log: file that takes what the process prints.
        prepare: called at once, for its imports.
        act: called after `go`; its result is the exit code, None is 0.
        leads_group: give the process a group of its own, which ends with it: its children too.
    """

    def __init__(
        self,
        method: Method,
        log: Path,
        prepare: Callable[[], object],
        act: Callable[[], int | None],
        leads_group: bool = False,
    ):
        processes: Any = multiprocessing.get_context(method)
        self._turn = processes.Event()
        self._leads_group = leads_group
        self._process = processes.Process(target=_enter, args=(log, prepare, act, leads_group, self._turn))
        self._process.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def go(self) -> None:
        self._turn.set()

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None where the time ran out; negative where a signal ended it."""
        self._process.join(seconds)
        return self._process.exitcode

    def end(self) -> None:
        """Kills what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            if self._leads_group:
                os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


def _enter(
    log: Path, prepare: Callable[[], object], act: Callable[[], int | None], leads_group: bool, turn: Event
) -> None:
    if leads_group:
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: who started this process ends it
    _print_into(log)
    faulthandler.enable()
    prepare()
    _await(turn)
    code = act()
    if code:
        sys.exit(code)


def _print_into(log: Path) -> None:
    """Libraries written in C print too, so the descriptors themselves are redirected; and a fork may have inherited
    another stdout than the process's own."""
    with log.open("ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))


def _await(turn: Event) -> None:
    parent = multiprocessing.parent_process()
    while not turn.wait(1.0):
        if parent is not None and not parent.is_alive():
            sys.exit("whoever started this process is gone")
