"""Runs functions on several ranks. A fork server that has paid for the imports forks every process in milliseconds."""

import contextlib
import io
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])
_TIMEOUT = 240.0
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(
    function: Callable[..., Any], rank: int, size: int, port: int, pipe: Connection, args: Sequence[Any]
) -> None:
    import torch

    values = (rank, size, rank, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(_VARIABLES, values, strict=True)})
    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*args)))
    except BaseException:  # noqa: BLE001 - whatever it is, the test wants to see it
        pipe.send((False, traceback.format_exc()))


def start(function: Callable[..., Any], size: int, *args: Any) -> list[tuple[BaseProcess, Connection]]:
    """Starts `function(*args)` on so many ranks and returns the processes and where their results come."""
    port = free_port()
    started = []
    for rank in range(size):
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_enter, args=(function, rank, size, port, there, args), daemon=True)
        process.start()
        there.close()
        started.append((process, here))
    return started


def join(started: Sequence[tuple[BaseProcess, Connection]]) -> list[Any]:
    """The results, rank by rank. Raises AssertionError with the traceback of the rank that failed."""
    results = []
    try:
        for rank, (_, pipe) in enumerate(started):
            assert pipe.poll(_TIMEOUT), f"rank {rank} did not answer in {_TIMEOUT} s"
            worked, result = pipe.recv()
            assert worked, f"rank {rank} failed:\n{result}"
            results.append(result)
    finally:
        for process, _ in started:
            process.join(5)
            process.kill()
    return results


def run(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """`function(*args)` on so many ranks: its results, rank by rank."""
    return join(start(function, size, *args))


def command(*argv: str) -> int:
    """The exit code of `imm-scale ARGV` in this process."""
    from imm_scale.cli import main

    return main(argv)


def command_and_output(*argv: str) -> tuple[int, str]:
    """The exit code of `imm-scale ARGV` in this process, and all it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        code = command(*argv)
    return code, printed.getvalue()


def _typed(folder: str, argv: Sequence[str]) -> tuple[int, str]:
    for name in _VARIABLES:
        del os.environ[name]
    os.chdir(folder)
    sys.path.insert(0, folder)
    return command_and_output(*argv)


def typed(folder: object, *argv: object) -> tuple[int, str]:
    """`python -m imm_scale ARGV` as typed in a folder, without a launcher and without the seconds of its imports."""
    return run(_typed, 1, str(folder), [str(word) for word in argv])[0]


def train(size: int, *argv: str) -> None:
    """`imm-scale train ARGV` on so many ranks, which must succeed."""
    assert run(command, size, "train", *argv) == [0] * size


def _train_each(runs: Sequence[Sequence[str]]) -> None:
    from imm_scale import config as configs
    from imm_scale.training.trainer import train as train_one

    for argv in runs:
        train_one(configs.load_words(argv).config)


def train_each(size: int, runs: Sequence[Sequence[str]]) -> None:
    """`imm-scale train` for each list of words, one after the other in the same ranks, which saves their start."""
    if runs:
        run(_train_each, size, runs)
