"""What launchers/environment.sh leaves to the site, the user and the ranks; SLURM's command is played by a script."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SLURM = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
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
            ["bash", "-euo", "pipefail", "-c", "source launchers/environment.sh; env -0"],
            env=env, cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if "=" in pair)

    return run


def test_ranks_learn_of_all_hosts_and_choose_for_themselves_what_differs_between_nodes(sourced):
    env = sourced()
    assert env["MASTER_ADDR"] == "node1" and env["HOSTS"].split() == ["node1", "node2"]
    assert not set(LEFT_TO_RANKS) & set(env)


def test_what_the_site_has_set_stays(sourced):
    before = {name: f"mine-{i}" for i, name in enumerate((*LEFT_TO_RANKS, "NCCL_DEBUG", "TORCH_FR_BUFFER_SIZE"))}
    env = sourced(**before)
    assert {name: env[name] for name in before} == before
