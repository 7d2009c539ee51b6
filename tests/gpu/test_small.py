"""`make gpu` at size small: every section's code runs on a CPU, so that the command cannot rot."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.sections import SECTIONS

_ROOT = Path(__file__).parents[2]
_SECONDS = 120.0  # of this process's children, and not by the clock: others may be busy on this machine


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_every_section_runs_on_a_cpu_and_keeps_its_checks(tmp_path):
    before = _cpu_seconds()
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--size", "small", "--out", str(tmp_path)],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert answer.returncode == 0, answer.stdout
    assert [result["section"] for result in results] == [section.name for section in SECTIONS]
    assert {result["outcome"] for result in results} == {"done"}
    for result in results:
        kinds = [entry["kind"] for entry in result["entries"]]
        assert set(kinds) - {"skipped"}, f"{result['section']} measured nothing"
        assert all(entry["value"] for entry in result["entries"] if entry["kind"] == "skipped"), "without a reason"
    assert (tmp_path / "table.md").read_text().count("\n| ") > len(SECTIONS)
    assert json.loads((tmp_path / "machine.json").read_text())["device"].startswith("CPU")
    assert _cpu_seconds() - before < _SECONDS
