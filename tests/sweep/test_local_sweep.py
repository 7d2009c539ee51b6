"""A small sweep for real: cells on this machine, one killed, the whole interrupted, retried, collected, reported."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from imm_scale.cli import main as imm_scale
from imm_scale.sweeps import definition, results
from launchers.sweep import main
from tests.browser import Browser

ROOT = Path(__file__).parents[2]


def _states(path: str) -> dict[str, str]:
    return {one.cell.name: one.state for one in results.outcomes(definition.load(path))}


def _until(what: str, condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def path(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sweep file that ships for this, with its data and folder here."""
    folder = tmp_path_factory.mktemp("sweep")
    document = yaml.safe_load((ROOT / "configs/sweep/digits_scaling_ci.yaml").read_text())
    document["name"] = "small"
    document["folder"] = str(folder / "out")
    document["configs"] = [str(ROOT / "configs/demo.yaml")]
    document["settings"] |= {"data.manifest": digits, "train.checkpoint_every": 10}
    (folder / "small.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return str(folder / "small.yaml")


@pytest.fixture(scope="module")
def interrupted(path: str) -> str:
    """The sweep after its first cell was killed with -9 and Ctrl-C was pressed while the second ran."""
    sweep = definition.load(path)
    command = [sys.executable, "-m", "launchers.sweep", "submit", path, "--local", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that runs the tests in the background lets them, and what they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    first, second = sweep.cells[:2]

    def trains(cell: definition.Cell, steps: int) -> bool:
        return results.outcome(sweep, cell).step >= steps and results.read_state(sweep.folder, cell.name) != {}

    try:
        _until("the first cell trains", lambda: trains(first, 15))
        os.kill(results.read_state(sweep.folder, first.name)["pid"], signal.SIGKILL)
        _until("the second cell trains", lambda: trains(second, 5))
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, printed
    assert "stopping: 1 cells commit what they have" in printed
    return path


def test_interrupted_cells_are_known_and_the_others_missing(interrupted):
    assert list(_states(interrupted).values()) == ["interrupted", "interrupted", "missing", "missing"]


def test_retry_submit_collect_and_report(interrupted, tmp_path, capfd):
    sweep = definition.load(interrupted)
    committed = results.outcome(sweep, sweep.cells[1]).step
    assert committed >= 5
    assert main(["retry", interrupted, "--local", "2"]) == 0
    assert list(_states(interrupted).values()) == ["finished", "finished", "missing", "missing"]
    assert "2 of 4 cells to run (2 missing)" in capfd.readouterr().err
    log = (Path(sweep.folder) / "logs" / f"{sweep.cells[1].name}.log").read_text()
    assert f"at step {committed} " in log, "the cell went on from what it had committed"
    assert main(["submit", interrupted, "--local", "2"]) == 0
    assert set(_states(interrupted).values()) == {"finished"}
    before = _snapshot(sweep.folder)
    assert main(["submit", interrupted, "--local", "2"]) == 0
    assert "0 of 4 cells to run (4 finished)" in capfd.readouterr().err
    assert _snapshot(sweep.folder) == before, "submitting a finished sweep starts nothing"
    for cell in sweep.cells:
        steps = [json.loads(line)["step"] for line in (Path(cell.run_dir) / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))
        assert steps[-1] == cell.config.train.max_steps
    _check_collected(sweep)
    _check_report(sweep, tmp_path, capfd)


def _snapshot(folder: str) -> dict[str, int]:
    """When each state and evaluation was written."""
    files = [*Path(folder).glob("states/*"), *Path(folder).glob("runs/*/evaluations/*")]
    return {str(file): file.stat().st_mtime_ns for file in files}


def _check_collected(sweep: definition.Sweep) -> None:
    assert main(["collect", sweep.folder]) == 0
    table = pq.read_table(Path(sweep.folder) / results.RESULTS).to_pylist()
    assert len(table) == 4 * 2, "a row a cell and step count"
    for row in table:
        files = (Path(sweep.folder) / "runs" / row["cell"] / "evaluations").glob("*.json")
        measured = {r["steps"]: r["mean"] for file in files for r in json.loads(file.read_text())["results"]}
        assert row["mean"] == measured[row["steps"]]
        assert row["code"]


def _check_report(sweep: definition.Sweep, tmp_path: Path, capfd) -> None:
    out = tmp_path / "page.html"
    capfd.readouterr()
    assert imm_scale(["report", sweep.folder, "--out", str(out), "--figures", str(tmp_path / "figures")]) == 0
    # Two cells are held out: no law has enough points, and the page says so.
    assert "2 points cannot carry a law of 5 parameters" in capfd.readouterr().out
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"samples.png", "training-1.svg", "training-2.svg", "inference.svg", "isoflop-1.svg"} <= drawn
    with Browser() as browser:
        for width in (1280, 400):
            seen = browser.look(out, width)
            assert seen["pictures"] == len(drawn)
            assert seen["broken"] == []
            assert seen["overflow"] <= 0, "the page must not scroll sideways"
            assert seen["least_text"] >= 12
            for phrase in (*(cell.name for cell in sweep.cells), "held out", "What the data cannot tell"):
                assert phrase in seen["text"]
        assert browser.complaints == []
