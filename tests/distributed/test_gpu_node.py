"""The script for a node of several GPUs, where it can run without one."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu_node
from imm_scale.checkpoint import run_folder
from launchers.records.history import History, Start
from tests import ranks

ROOT = Path(__file__).parents[2]


def _checks(out: str) -> list[tuple[str, bool | None]]:
    return [(check.name, check.passed) for check in gpu_node.run_checks(Path(out), small=True)]


def test_every_check_runs_on_two_ranks(tmp_path):
    gpu_node.write_run(tmp_path, small=True)
    first, second = ranks.run(_checks, 2, str(tmp_path))
    assert first == second
    checks = dict(first)
    judged = {name for name, passed in checks.items() if passed}
    assert not [name for name, passed in checks.items() if passed is False]
    assert {"doctor: gloo", "reduction in fp32", "reduction in bf16", "overlap, stage 1, loss"} <= judged
    assert {"overlap, stage 2, loss", "stage 3, gathered", "stage 3, scattered"} <= judged
    assert checks["contexts"] is None, "no GPU here"


@pytest.mark.parametrize(("outcomes", "seconds", "failing"), [
    (["failed", "completed"], 5.0, []),
    (["failed", "completed"], 100.0, ["SIGKILL: the step ends"]),
    (["failed"], 5.0, ["the job is put back", "it went on from a commit"]),
])  # fmt: skip
def test_the_verdict_on_a_broken_run(outcomes, seconds, failing, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run_dir = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    starts = [Start("7", i, ["n"], 20 * i, 0.0, outcome=outcome) for i, outcome in enumerate(outcomes)]
    History("7", starts).save(run_dir)
    run_folder.write_status(run_dir, "completed", step=3)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps({"step": n}) + "\n" for n in (1, 2, 3)))
    (tmp_path / "broken.json").write_text(json.dumps({"signal": "KILL", "seconds": seconds}))
    assert [check.name for check in gpu_node.verdict(tmp_path) if not check.passed] == failing


@pytest.mark.parametrize("path", [ROOT / "benchmarks" / "gpu_node.sbatch", *sorted((ROOT / "launchers").glob("*.s*h"))])
def test_bash_can_read_the_script(path):
    subprocess.run(["bash", "-n", path], check=True)
