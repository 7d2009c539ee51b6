"""A run on a real SLURM comes to its end as if nothing had happened, whatever happens.

`IMM_SOAK` adds the cases marked `soak`; the others cover the ways in which a job comes back: SLURM's own (a lost node)
and the launcher's (a dead rank).
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from imm_scale import config as configs
from imm_scale.checkpoint.format import committed_steps
from launchers import submit
from launchers.records import submissions
from launchers.records.history import History
from tests.conftest import losses
from tests.slurm.cluster import Cluster, ranks_of, run, until
from tests.slurm.conftest import STEPS

soak = pytest.mark.skipif("IMM_SOAK" not in os.environ, reason="minutes each: set IMM_SOAK")
EVERY = 10


@pytest.fixture
def settings(tiny: list[str]) -> list[str]:
    return [*tiny, f"train.max_steps={STEPS}", f"train.checkpoint_every={EVERY}"]


def _submit(run_dir: Path, settings: list[str], *flags: str) -> int:
    overrides = [*settings, f"run.dir={run_dir}"]
    assert submit.main(["train", *overrides, "--cluster", "lab", "--nodes", "2", *flags]) == 0
    return submissions.job_of(str(run_dir))


def _steps_done(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def _training(run_dir: Path, step: int) -> None:
    until(f"step {step}", lambda: _steps_done(run_dir) >= step)


def _history(run_dir: Path, job: int) -> History:
    return History.load(str(run_dir), str(job))


def _assert_undisturbed(run_dir: Path, curve: list[float]) -> None:
    """Every step once, with the loss it has anyway."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    # As between any two worlds: fp32 sums in another order, here over enough steps for it to grow.
    np.testing.assert_allclose(losses(run_dir), curve, rtol=2e-3)
    assert json.loads((run_dir / "status.json").read_text())["state"] == "completed"


def _assert_came_back(cluster: Cluster, run_dir: Path, job: int, curve: list[float], committed: int) -> History:
    """The job ends COMPLETED in two starts, the second from a commit no older than `committed`."""
    cluster.wait(job)
    _assert_undisturbed(run_dir, curve)
    history = _history(run_dir, job)
    first, second = history.of_this_job
    assert (first.restart, second.restart) == (0, 1)
    assert second.step == first.end_step >= committed > 0  # ranks that hear of it commit once more
    assert second.outcome == "completed"
    return history


def _newest(run_dir: Path) -> int:
    return committed_steps(str(run_dir))[-1]


def test_a_run_with_hostile_values_trains_to_its_end(cluster, settings, tmp_path, undisturbed):
    run_dir = tmp_path / 'a b\'; $(touch pwned) "é`touch pwned`" & 50%|#'
    name = "run.name=\"two\nlines; $(touch pwned) 'single' `touch pwned` é | > pwned\""
    job = _submit(run_dir, [*settings, name])
    cluster.wait(job)
    _assert_undisturbed(run_dir, undisturbed)
    # The ranks got the very words, and nothing in them was run.
    overrides = [*settings, name, f"run.dir={run_dir}"]
    assert configs.from_yaml((run_dir / "config.yaml").read_text()) == configs.load_words(overrides).config
    assert not [*tmp_path.rglob("*pwned"), *Path.cwd().glob("*pwned")]
    assert {path.name for path in (run_dir / "launches" / "0001").iterdir()} == {
        "code.diff", "code.json", "config.yaml", "job", "script.sbatch",
    }  # fmt: skip
    assert f"step {STEPS}/{STEPS}" in (run_dir / "logs" / f"slurm-{job}.out").read_text()
    assert {f"output-0000{rank}.log" for rank in (1, 2, 3)} <= {path.name for path in (run_dir / "logs").iterdir()}


def test_a_killed_rank(cluster, settings, tmp_path, undisturbed):
    job = _submit(tmp_path / "run", settings)
    _training(tmp_path / "run", 25)
    committed = _newest(tmp_path / "run")
    victim = next(process for process in ranks_of(job) if process.rank == 3)
    victim.kill()
    history = _assert_came_back(cluster, tmp_path / "run", job, undisturbed, committed)
    assert (history.starts[0].outcome, history.starts[0].failed_nodes) == ("failed", [victim.node])


def test_a_node_cut_off_the_network(cluster, settings, tmp_path, undisturbed):
    job = _submit(tmp_path / "run", settings)
    _training(tmp_path / "run", 25)
    committed = _newest(tmp_path / "run")
    node = next(process.node for process in ranks_of(job) if process.rank == 3)
    cluster.cut_off(node)
    history = _assert_came_back(cluster, tmp_path / "run", job, undisturbed, committed)
    assert (history.starts[0].outcome, history.starts[0].failed_nodes) == ("interrupted", [node])


@soak
def test_a_node_set_down(cluster, settings, tmp_path, undisturbed):
    job = _submit(tmp_path / "run", settings)
    _training(tmp_path / "run", 25)
    committed = _newest(tmp_path / "run")
    node = next(process.node for process in ranks_of(job) if process.rank == 0)
    cluster.set_down(node)
    history = _assert_came_back(cluster, tmp_path / "run", job, undisturbed, committed)
    assert (history.starts[0].outcome, history.starts[0].failed_nodes) == ("interrupted", [node])


@soak
def test_all_processes_of_a_node_killed(cluster, settings, tmp_path, undisturbed):
    job = _submit(tmp_path / "run", settings)
    _training(tmp_path / "run", 25)
    committed = _newest(tmp_path / "run")
    node = next(process.node for process in ranks_of(job) if process.rank == 3)
    cluster.kill_everything(node)
    _assert_came_back(cluster, tmp_path / "run", job, undisturbed, committed)


@soak
def test_requeued_by_the_administrator(cluster, settings, tmp_path, undisturbed):
    job = _submit(tmp_path / "run", settings)
    _training(tmp_path / "run", 25)
    committed = _newest(tmp_path / "run")
    run("scontrol", "requeue", str(job))
    history = _assert_came_back(cluster, tmp_path / "run", job, undisturbed, committed)
    assert history.starts[0].failed_nodes == []


@soak
def test_preempted_by_an_urgent_job(cluster, settings, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    job = _submit(run_dir, [*settings, "train.checkpoint_every=1000000"])
    _training(run_dir, 15)
    run("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    history = _assert_came_back(cluster, run_dir, job, undisturbed, 15)
    assert history.starts[0].outcome in ("preempted", "interrupted")  # by whoever puts it back first


@soak
def test_the_time_limit(cluster, settings, tmp_path, undisturbed):
    # Far more steps than fit, so that the limit comes first; then as many as the curve has.
    run_dir = tmp_path / "run"
    endless = [*settings, "train.max_steps=1000000", "train.checkpoint_every=1000000"]
    # SLURM may send the signal up to a minute early, and ranks must be listening by then.
    job = _submit(run_dir, endless, "--time", "00:03:00", "--grace-seconds", "60")
    until("a second start", lambda: len(_history(run_dir, job).of_this_job) == 2)
    first, second = _history(run_dir, job).of_this_job
    assert first.outcome == "preempted"
    assert "DUE TO TIME LIMIT" not in (run_dir / f"logs/slurm-{job}.out").read_text()  # it was gone before
    assert second.step == first.end_step == _newest(run_dir) > 0
    run("scancel", str(job))
    curve = losses(run_dir)[:STEPS]
    np.testing.assert_allclose(curve, undisturbed[: len(curve)], rtol=2e-3)


@soak
def test_a_node_that_failed_twice_is_excluded(cluster, settings, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    job = _submit(run_dir, settings)
    bad = []
    for start in (1, 2):
        until(f"start {start}", lambda start=start: len(_history(run_dir, job).of_this_job) == start)
        _training(run_dir, _newest(run_dir) + 5 if start > 1 else 15)
        until("ranks", lambda: len(ranks_of(job)) == 4)
        victim = next(process for process in ranks_of(job) if process.node == "node2")
        victim.kill()
        bad.append(victim.node)
    cluster.wait(job)
    _assert_undisturbed(run_dir, undisturbed)
    history = _history(run_dir, job)
    assert history.excluded() == ["node2"]
    assert [start.failed_nodes for start in history.starts] == [["node2"], ["node2"], []]
    assert "node2" not in history.starts[2].nodes
    assert "from now on without node2, where it failed twice" in (run_dir / f"logs/slurm-{job}.out").read_text()


@soak
def test_a_run_without_progress_stops_and_says_why(cluster, settings, tmp_path):
    run_dir = tmp_path / "run"
    job = _submit(run_dir, [*settings, "train.checkpoint_every=100000"])
    for rank in (0, 3):
        until("ranks train", lambda: len(ranks_of(job)) == 4 and _steps_done(run_dir) >= 3)
        next(process for process in ranks_of(job) if process.rank == rank).kill()
        until("the ranks are gone", lambda: not ranks_of(job))
        (run_dir / "metrics.jsonl").unlink()
    cluster.wait(job, "FAILED")
    assert "no progress past step 0 in 2 starts" in _history(run_dir, job).stopped
    assert "no progress" in (run_dir / f"logs/slurm-{job}.out").read_text()


@soak
def test_fewer_nodes_than_before(cluster, settings, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    cluster.set_down("node4")
    job = _submit(run_dir, settings, "--nodes", "2-3", "--gpus-per-node", "2")
    _training(run_dir, 25)
    committed = _newest(run_dir)
    cluster.set_down("node3")
    history = _assert_came_back(cluster, run_dir, job, undisturbed, committed)
    assert [len(start.nodes) for start in history.of_this_job] == [3, 2]


@soak
@pytest.mark.parametrize("launch", ["torchrun", "deepspeed"])
def test_the_other_launchers(launch, cluster, settings, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    job = _submit(run_dir, [*settings, "train.checkpoint_every=1000000"], "--launch", launch)
    _training(run_dir, 10)
    run("scancel", "--signal=USR1", str(job))  # what SLURM sends before the time limit
    history = _assert_came_back(cluster, run_dir, job, undisturbed, 10)
    assert history.starts[0].outcome == "preempted"


@soak
def test_a_run_cancelled_commits_and_a_finished_one_is_not_started_again(cluster, settings, tmp_path, capsys):
    run_dir = tmp_path / "run"
    job = _submit(run_dir, [*settings, "train.checkpoint_every=1000000"])
    assert submit.main(["train", *settings, f"run.dir={run_dir}", "--cluster", "lab"]) == 2
    assert f"in the queue already, as job {job}" in capsys.readouterr().err
    _training(run_dir, 10)
    assert submit.main(["cancel", str(run_dir)]) == 0
    cluster.wait(job, "FAILED")
    assert _history(run_dir, job).of_this_job[0].outcome == "cancelled"
    assert _newest(run_dir) >= 10
    second = _submit(run_dir, settings)
    cluster.wait(second)
    run("scontrol", "requeue", str(second))
    until("it ran again", lambda: "nothing to start" in (run_dir / f"logs/slurm-{second}.out").read_text())
    cluster.wait(second)
    assert len(_history(run_dir, second).of_this_job) == 1
    assert submit.main(["train", *settings, f"run.dir={run_dir}", "--cluster", "lab"]) == 0
    assert "nothing to submit" in capsys.readouterr().out


@soak
def test_the_script_by_hand(cluster, settings, tmp_path, undisturbed, monkeypatch):
    run_dir = tmp_path / "run"
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # the environment is active
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    flags = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
    overrides = [*settings, f"run.dir={run_dir}"]
    output = f"--output={tmp_path}/%j.out"
    job = int(run("sbatch", "--parsable", *flags, output, "launchers/train.sbatch", *overrides))
    cluster.wait(job)
    _assert_undisturbed(run_dir, undisturbed)
