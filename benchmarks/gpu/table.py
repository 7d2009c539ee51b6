"""The results as a table, for the terminal and, as Markdown, for docs/gpu.md."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import machine
from benchmarks.gpu.report import Entry, Value
from benchmarks.gpu.runner import Result

_COLUMNS = ("section", "entry", "value", "bound", "verdict")
_VERDICTS = {("check", True): "holds", ("check", False): "FAILS", ("goal", True): "met", ("goal", False): "missed"}


def text(results: Sequence[Result]) -> str:
    """Columns for a terminal, and a line that counts."""
    rows = [_COLUMNS, *_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_crashes(results), summary(results)])


def markdown(results: Sequence[Result], out: Path) -> str:
    """A section of docs/gpu.md: what it ran on, and a table."""
    rows = [_COLUMNS, tuple("---" for _ in _COLUMNS), *_rows(results)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    crashes = [f"```text\n{crash}\n```\n" for crash in _crashes(results)]
    return "\n".join([_heading(out), "", *lines, "", *crashes, summary(results), ""])


def summary(results: Sequence[Result]) -> str:
    """How many of what."""
    entries = [entry for result in results for entry in result.entries]
    counts = {verdict: sum(_verdict(entry) == verdict for entry in entries) for verdict in _VERDICTS.values()}
    skipped = sum(entry.kind == "skipped" for entry in entries)
    ended = [f"{result.section} {result.outcome}" for result in results if result.outcome not in ("done", "failed")]
    parts = [f"{counts['holds']} checks hold, {counts['FAILS']} fail", f"{skipped} entries skipped"]
    if counts["met"] + counts["missed"]:
        parts.insert(1, f"{counts['met']} goals met, {counts['missed']} missed")
    seconds = sum(result.seconds for result in results)
    return "; ".join([f"{len(results)} sections in {seconds:.0f} s", *parts, *ended])


def _heading(out: Path) -> str:
    path = out / machine.NAME
    if not path.exists():
        return "No section got as far as to say what it ran on."
    on = json.loads(path.read_text())
    versions = ", ".join(
        f"{name} {on[name]}" for name in ("driver", "cuda", "nccl", "torch", "deepspeed", "triton") if on[name]
    )
    commit = f", commit {on['commit'][:12]}" if on["commit"] else ""
    return f"{on['device']}, {on['date']}{commit}: `{on['command']}`\n\n{versions}, Python {on['python']}"


def _rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for result in results:
        for entry in result.entries:
            shown = _shown(entry.value, entry.unit)
            rows.append((result.section, entry.name, shown, entry.bound, _verdict(entry)))
        why = result.why.splitlines()[0] if result.why else ""
        rows.append((result.section, "all of it", f"{result.seconds:.1f} s", why, result.outcome))
    return rows


def _verdict(entry: Entry) -> str:
    if entry.kind in ("check", "goal"):
        return _VERDICTS[entry.kind, bool(entry.passed)]
    return "skipped" if entry.kind == "skipped" else ""


def _shown(value: Value, unit: str) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{shown} {unit}".rstrip()


def _crashes(results: Sequence[Result]) -> list[str]:
    return [f"{result.section} crashed: {result.why}" for result in results if result.outcome == "crashed"]
