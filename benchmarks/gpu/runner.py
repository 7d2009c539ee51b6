"""Runs sections one after the other, each in a fresh process under its own limit, and keeps what they say."""

import contextlib
import faulthandler
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from benchmarks.gpu import machine
from benchmarks.gpu.job import Job
from benchmarks.gpu.report import Context, Entry, Report
from benchmarks.gpu.sections import Section

Outcome = Literal["done", "failed", "crashed", "over its limit"]
_SMALL_LIMIT = 120  # seconds, whatever the section, on a machine that may be busy
_LAST_LINES = 6  # of a traceback, kept in the table
_TO_DUMP = 1.0  # seconds before its limit at which a section says in its log where it stands


@dataclass(frozen=True)
class Result:
    """What became of a section.

    Attributes:
        outcome: `done`, `failed` (a check was not kept), `crashed`, or `over its limit`.
        seconds: from its turn to its end.
        why: of a crash, the last lines the process printed; else a sentence, or "".
    """

    section: str
    outcome: Outcome
    seconds: float
    why: str
    entries: Sequence[Entry]


def run(sections: Sequence[Section], context: Context) -> list[Result]:
    """Runs them in order, whatever becomes of each. While one runs the next one's process does its imports."""
    _clear(sections, context.out)
    results = []
    with contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(_start(section, context)) for section in sections[:1]]
        for number, section in enumerate(sections):
            jobs += [stack.enter_context(_start(following, context)) for following in sections[number + 1 : number + 2]]
            _say(f"{section.name}: {section.what}")
            result = _run(section, context, jobs[number])
            jobs[number].end()
            _say(f"{section.name}: {result.outcome} after {result.seconds:.1f} s")
            results.append(result)
            _write(results, context.out)
    return results


def succeeded(results: Sequence[Result]) -> bool:
    """Whether every section came to its end and kept every check."""
    return all(result.outcome == "done" for result in results)


def _clear(sections: Sequence[Section], out: Path) -> None:
    """Removes what an earlier command left under the names this one writes."""
    out.mkdir(parents=True, exist_ok=True)
    names = [f"{section.name}.{kind}" for section in sections for kind in ("json", "log")]
    for name in [*names, "machine.json", "results.json", "table.md"]:
        (out / name).unlink(missing_ok=True)


def _start(section: Section, context: Context) -> Job:
    act = partial(_perform, section, context)
    return Job(context.method, context.out / f"{section.name}.log", section.load, act, leads_group=True)


def _run(section: Section, context: Context, job: Job) -> Result:
    limit = _limit(section, context)
    began = time.perf_counter()
    job.go()
    code = job.wait(limit)
    seconds = time.perf_counter() - began
    path = context.out / f"{section.name}.json"
    entries = [Entry(**entry) for entry in json.loads(path.read_text())] if path.exists() else []
    if code is None:
        return Result(section.name, "over its limit", seconds, f"over its limit of {limit:g} s", entries)
    if code:
        return Result(section.name, "crashed", seconds, _log_tail(context.out / f"{section.name}.log", code), entries)
    failed = any(entry.kind == "check" and not entry.passed for entry in entries)
    return Result(section.name, "failed" if failed else "done", seconds, "", entries)


def _limit(section: Section, context: Context) -> float:
    return _SMALL_LIMIT if context.small else context.slack * section.limit


def _perform(section: Section, context: Context) -> None:
    """What the process of a section does."""
    faulthandler.dump_traceback_later(_limit(section, context) - _TO_DUMP)
    report = Report(context.out / f"{section.name}.json")
    if context.small:
        torch.set_num_threads(1)  # several would wait for each other on a shared machine
    machine.note(context.out)
    missing = _missing_memory(section, context)
    if missing:
        report.skip("all of it", missing)
        return
    section.load()(context, report)
    sys.stdout.flush()
    os._exit(0)  # taking down CUDA and NCCL in order is no part of a section, and may take as long as one


def _missing_memory(section: Section, context: Context) -> str:
    if context.device.type != "cuda":
        return ""
    free = torch.cuda.mem_get_info()[0] / 2**30
    return "" if free >= section.memory else f"needs {section.memory} GiB of GPU memory, {free:.1f} are free"


def _log_tail(log: Path, code: int) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if not line.startswith("Extension modules")]
    ending = f"exit code {code}" if code > 0 else f"ended by signal {-code}"
    return "\n".join([ending, *lines[-_LAST_LINES:]]).strip()


def _write(results: Sequence[Result], out: Path) -> None:
    draft = out / "results.part"
    draft.write_text(json.dumps([asdict(result) for result in results], indent=1))
    os.replace(draft, out / "results.json")


def _say(message: str) -> None:
    print(f"[gpu] {message}", file=sys.stderr, flush=True)
