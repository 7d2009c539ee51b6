"""`make demo` as a shell runs it, with a stand-in for `imm-scale` that notes how it was called."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of a command it notes the beginning and its process; the page's waits as the real one does, for both evaluations.
STAND_IN = """#!/bin/sh
echo "$$ $*" >> "$LOG"
case "$1" in
  report) while [ "$(grep -c ' evaluate ' "$LOG")" -lt 2 ]; do sleep 0.05; done ;;
  train) sleep "$TRAINS"; exit "$CODE" ;;
esac
"""


@pytest.fixture
def demo(tmp_path):
    """Starts `make demo`; what it calls is noted in tmp_path/log."""
    for name, text in (("venv/bin/imm-scale", STAND_IN), ("digits/latents/manifest.json", "{}"), ("venv/.ready", "")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    started = []

    def start(trains: float, code: int = 0) -> subprocess.Popen:
        # As a terminal starts it: no make above it, and a process group of its own.
        environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
        environment |= {"LOG": str(tmp_path / "log"), "TRAINS": str(trains), "CODE": str(code)}
        argv = ["make", "demo", f"VENV={tmp_path}/venv", f"DIGITS={tmp_path}/digits"]
        made = subprocess.Popen(argv, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        started.append(made)
        return made

    yield start
    for made in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(made.pid, signal.SIGKILL)


def _calls(folder: Path) -> list[tuple[int, list[str]]]:
    """(process, words) of each call so far, in order."""
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(line.split()[0]), line.split()[1:]) for line in lines]


def _wait_for_calls(folder: Path, count: int) -> None:
    until = time.monotonic() + 20
    while len(_calls(folder)) < count:
        assert time.monotonic() < until, _calls(folder)
        time.sleep(0.02)


def _is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _all_gone(folder: Path) -> bool:
    until = time.monotonic() + 5  # signals take a moment
    while any(_is_running(process) for process, _ in _calls(folder)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(_is_running(process) for process, _ in _calls(folder))


def test_both_runs_go_on_side_by_side_under_a_page_that_ends_with_them(demo, tmp_path):
    made = demo(trains=0.5)
    _wait_for_calls(tmp_path, 3)
    first = [argv for _, argv in _calls(tmp_path)]
    assert sorted(argv[0] for argv in first) == ["report", "train", "train"]
    page = next(argv for argv in first if argv[0] == "report")
    assert page[1:3] == ["runs/demo/imm", "runs/demo/flow_matching"]
    assert {"--watch", "--draw"} < set(page)
    assert made.wait(20) == 0
    rest = [argv for _, argv in _calls(tmp_path)][3:]
    for run in ("runs/demo/imm", "runs/demo/flow_matching"):
        assert [argv[0] for argv in rest if argv[1] == run] == ["sample", "evaluate"]
    assert _all_gone(tmp_path)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_nothing_goes_on_when_it_is_interrupted(demo, tmp_path, sent):
    made = demo(trains=60)
    _wait_for_calls(tmp_path, 3)
    os.killpg(made.pid, sent)  # what Ctrl-C does; the shell has told the page's process to ignore it
    assert made.wait(20) != 0
    assert _all_gone(tmp_path)


def test_a_run_that_fails_ends_the_demo_and_its_page(demo, tmp_path):
    made = demo(trains=0.1, code=2)
    assert made.wait(20) != 0
    assert "evaluate" not in {argv[0] for _, argv in _calls(tmp_path)}
    assert _all_gone(tmp_path)
