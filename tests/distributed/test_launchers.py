"""`imm-scale train` under the launchers people use, started as they start it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from imm_scale.checkpoint.format import committed_steps
from tests import ranks
from tests.conftest import losses

BIN = Path(sys.executable).parent
STEPS = ["train.max_steps=3"]


@pytest.fixture(scope="module")
def alone(digits: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    from tests.conftest import TINY

    run_dir = tmp_path_factory.mktemp("alone") / "run"
    ranks.train(1, *TINY, f"data.manifest={digits}", f"run.dir={run_dir}", *STEPS)
    return losses(run_dir)


@pytest.mark.parametrize(
    "launch",
    [
        [sys.executable, "-m", "imm_scale"],
        [str(BIN / "imm-scale")],
        [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", "PORT", "-m", "imm_scale"],
        [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "PORT", "--module", "imm_scale"],
    ],
    ids=["python", "console script", "torchrun", "deepspeed"],
)
def test_a_launcher_trains_the_same_curve(launch, tiny, tmp_path, alone):
    command = [str(ranks.free_port()) if word == "PORT" else word for word in launch]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, "train", *tiny, *STEPS], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "completed"
    # As between any two worlds: fp32 sums in another order.
    np.testing.assert_allclose(losses(tmp_path / "run"), alone, rtol=1e-4)


def _told(running: subprocess.Popen[str], launch: list[str]) -> subprocess.Popen[str] | psutil.Process:
    """Whom to signal: the command itself, but of `deepspeed`, which would die and leave its launcher behind, that."""
    return psutil.Process(running.pid).children()[0] if launch[0].endswith("deepspeed") else running


@pytest.mark.parametrize(
    ("launch", "code"),
    [
        ([sys.executable, "-m", "imm_scale"], 75),
        ([str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", "PORT", "-m", "imm_scale"], 1),
        ([str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "PORT", "--module", "imm_scale"], 1),
    ],
    ids=["python", "torchrun", "deepspeed"],
)
def test_a_launcher_that_is_told_to_stop_leaves_a_commit(launch, code, tiny, tmp_path):
    command = [str(ranks.free_port()) if word == "PORT" else word for word in launch]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    running = subprocess.Popen([*command, "train", *tiny], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.05)
        _told(running, launch).send_signal(signal.SIGTERM)
        _, stderr = running.communicate(timeout=100)
    finally:
        running.kill()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "preempted", stderr
    assert status["reason"] == "SIGTERM asked the run to stop"
    assert committed_steps(str(tmp_path / "run")) == [status["step"]]
    assert running.returncode == code, "as docs/training.md says of this launcher"


@pytest.mark.parametrize("launch", ["srun", "torchrun", "deepspeed"])
def test_rank_sh_hands_on_the_words_and_no_others(launch, tmp_path):
    """To a module that takes no flag of a launcher's."""
    slurm = {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_NODES": "1"}
    site = {"LAUNCH": launch, "RANKS_PER_NODE": "1", "LOGS": str(tmp_path), "HOSTS": "localhost"}
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port()), "DS_ACCELERATOR": "cpu"}
    environment = {**os.environ, **slurm, **site, **master, "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = ["bash", "launchers/rank.sh", "launchers.cell", "no folder", "--index", "0"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=200
    )
    assert "launchers.cell: no folder is neither" in done.stdout + done.stderr
    assert "unrecognized" not in done.stdout + done.stderr
