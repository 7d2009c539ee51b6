"""Data and configs shared by the tests."""

import json
import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch

from data_tools import encode, pack
from tests import ranks

# As in the worker processes: two tests' thread pools on the same cores would wait for each other.
torch.set_num_threads(1)

TINY = (
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "method.k=10",
    "train.global_batch_size=64",
    "train.micro_batch_size=64",
    "train.log_every=1",
    "optimizer.lr=1e-3",
    "ema.decays=[0.99]",
    "wandb.mode=disabled",
    "sampling.batch_size=64",
)

# The same for other methods than IMM, which have no `method.k`.
ANY_METHOD = tuple(word for word in TINY if not word.startswith("method."))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The manifest of the 1,797 real digits as latent shards."""
    folder = tmp_path_factory.mktemp("digits")
    assert pack.main(["--source", "digits", "--out", f"{folder}/images"]) == 0
    assert encode.main(["--images", f"{folder}/images", "--out", f"{folder}/latents", "--codec", "pixels"]) == 0
    return f"{folder}/latents/manifest.json"


@pytest.fixture(scope="session")
def trained(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny run of two steps, for tests that only read it."""
    run_dir = str(tmp_path_factory.mktemp("trained") / "k=11-seed0")  # as cells of sweeps are called
    ranks.train(1, *TINY, f"data.manifest={digits}", f"run.dir={run_dir}", "train.max_steps=2")
    return run_dir


@pytest.fixture
def tiny(digits: str, tmp_path: Path) -> list[str]:
    """Overrides of a run that takes seconds: a tiny net on the digits, in tmp_path/run."""
    return [*TINY, f"data.manifest={digits}", f"run.dir={tmp_path}/run"]


def losses(run_dir: str | Path) -> list[float]:
    """The loss of every record of a run."""
    return [json.loads(line)["loss"] for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
