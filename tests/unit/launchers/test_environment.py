"""What launchers/environment.sh leaves to the site, the user and the ranks; SLURM's command is played by a script."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SLURM = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
_STEP = 'export STEP_WORDS="${STEP[*]}"'
LEFT_TO_RANKS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC")


@pytest.fixture
def sourced(tmp_path):
    """The variables that ranks inherit, for those set before."""
    stub = tmp_path / "scontrol"
    stub.write_text("#!/bin/bash\nprintf 'node1\\nnode2\\n'\n")
    stub.chmod(0o755)

    def run(**before: str) -> dict[str, str]:
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **SLURM, **before}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"source launchers/environment.sh; {_STEP}; env -0"],
            env=env, cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if "=" in pair)

    return run


def test_ranks_learn_of_all_hosts_and_choose_for_themselves_what_differs_between_nodes(sourced):
    env = sourced()
    assert env["MASTER_ADDR"] == "node1" and env["HOSTS"].split() == ["node1", "node2"]
    assert not set(LEFT_TO_RANKS) & set(env)


# The CPUs of a rank and of all ranks that one task starts: 8 ranks of 3 CPUs, whatever sbatch was asked for.
@pytest.mark.parametrize(("launch", "cpus"), [("srun", "3"), ("torchrun", "24"), ("deepspeed", "24")])
@pytest.mark.parametrize("requested", ["1", "3", "24", "64", None])
@pytest.mark.parametrize(
    ("tres", "left"),
    [
        ("cpu={}", "cpu={}"), ("cpu:{}", "cpu={}"), ("cpu={},gres/gpu:h100=1", "cpu={},gres/gpu:h100=1"),
        ("gres/gpu=1,cpu={}", "gres/gpu=1,cpu={}"), ("gres/gpu=1", "gres/gpu=1"), (None, None),
    ],
)  # fmt: skip
def test_srun_finds_one_number_of_cpus(sourced, launch, cpus, requested, tres, left):
    before = {"LAUNCH": launch, "RANKS_PER_NODE": "8", "CPUS_PER_RANK": "3"}
    if requested is not None:
        before["SLURM_CPUS_PER_TASK"] = requested
    if tres is not None:
        before["SLURM_TRES_PER_TASK"] = tres.format(requested or "7")
    env = sourced(**before)
    assert env["SRUN_CPUS_PER_TASK"] == env["SLURM_CPUS_PER_TASK"] == cpus
    assert env.get("SLURM_TRES_PER_TASK") == (None if left is None else left.format(cpus))
    assert "--cpus-per-task" not in env["STEP_WORDS"]


@pytest.mark.parametrize(("launch", "cpus"), [("srun", "6"), ("torchrun", "24")])
def test_a_script_submitted_by_hand_has_the_cpus_of_its_tasks(sourced, launch, cpus):
    env = sourced(LAUNCH=launch, SLURM_NTASKS_PER_NODE="4", SLURM_CPUS_PER_TASK="6")
    assert env["SRUN_CPUS_PER_TASK"] == env["SLURM_CPUS_PER_TASK"] == cpus


def test_what_the_site_has_set_stays(sourced):
    before = {name: f"mine-{i}" for i, name in enumerate((*LEFT_TO_RANKS, "NCCL_DEBUG", "TORCH_FR_BUFFER_SIZE"))}
    env = sourced(**before)
    assert {name: env[name] for name in before} == before
