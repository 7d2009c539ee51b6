"""A real SLURM of four nodes, where this machine lets one be started."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ranks
from tests.conftest import TINY, losses
from tests.slurm.cluster import LAB, Cluster

ROOT = Path(__file__).parents[2]
STEPS = 120


def _why_not() -> str:
    if sys.platform != "linux" or os.geteuid() != 0:
        return "starting a SLURM cluster takes root on Linux"
    if shutil.which("apt-get") is None:
        return "the SLURM cluster is installed by apt-get, on Debian"
    probe = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "network namespaces are not allowed here"


@pytest.fixture(scope="session")
def lab() -> Iterator[Cluster]:
    """The cluster, installed and started when a test first asks for it."""
    why_not = _why_not()
    if why_not:
        pytest.skip(why_not)
    folder = os.path.join(os.environ.get("TMPDIR", "/tmp"), "slurm-lab")
    env = {**os.environ, "LAB": folder}
    up = subprocess.run([LAB / "up.sh"], env=env, capture_output=True, text=True, check=False)
    assert up.returncode == 0, up.stdout + up.stderr
    os.environ["SLURM_CONF"] = f"{folder}/slurm.conf"
    yield Cluster(folder)
    subprocess.run([LAB / "down.sh"], env={**env, "CLEAN": "1"}, check=True, capture_output=True)


@pytest.fixture
def cluster(lab: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster in good health, and the checkout as working directory."""
    monkeypatch.chdir(ROOT)
    lab.mend()
    return lab


@pytest.fixture(scope="session")
def undisturbed(digits: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing happens to, on one rank in this machine's own network."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    ranks.train(1, *TINY, f"data.manifest={digits}", f"run.dir={run_dir}", f"train.max_steps={STEPS}")
    return losses(run_dir)
