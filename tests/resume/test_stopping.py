"""Leaving before a SLURM job ends, and starting from weights."""

import os
import time

import pytest
import torch

from imm_scale.checkpoint.format import Checkpoint, committed_steps
from imm_scale.checkpoint.run_folder import read_status
from tests import ranks


def _with_an_end(seconds: float, *argv: str) -> int:
    """Only rank 0 knows of a job, and that it ends in so many seconds."""
    if os.environ["RANK"] == "0":
        os.environ["SLURM_JOB_END_TIME"] = str(time.time() + seconds)
    return ranks.command(*argv)


def test_a_run_leaves_before_its_job_ends(tiny, tmp_path):
    run_dir = str(tmp_path / "run")
    settings = ["train", *tiny, "train.checkpoint_every=1000", "train.stop_before=2000"]
    assert ranks.run(_with_an_end, 2, 1000.0, *settings) == [75, 75]
    status = read_status(run_dir)
    # Wanted at the first step, agreed at the second.
    assert (status["state"], status["step"]) == ("preempted", 2)
    assert committed_steps(run_dir) == [2]
    assert ranks.run(_with_an_end, 2, 1e6, *settings, "train.max_steps=4") == [0, 0]


@pytest.mark.parametrize("form", ["run", "file"])
def test_init_from_starts_at_step_0_with_the_weights_of_a_run_or_a_file(form, trained, tiny, tmp_path):
    source = trained
    if form == "file":
        source = str(tmp_path / "weights.safetensors")
        assert ranks.run(ranks.command, 1, "export", trained, "--out", source, "--ema", "0") == [0]
    # A learning rate of almost nothing leaves the weights as they came; without init_from they would be the seed's.
    settings = [f"train.init_from={source}", "optimizer.lr=1e-30", "train.max_steps=1", "seed=5"]
    ranks.train(1, *tiny, *settings)
    state = "weight" if form == "file" else "ema-0.99"
    expected = Checkpoint.latest(trained).weights(state)
    checkpoint = Checkpoint.latest(str(tmp_path / "run"))
    assert (checkpoint.meta.step, checkpoint.meta.images_seen) == (1, 64)
    for name, tensor in checkpoint.weights().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-25)


def test_init_from_another_net_is_refused(trained, tiny):
    settings = [*tiny, f"train.init_from={trained}", "model.depth=3", "train.max_steps=1"]
    ((code, output),) = ranks.run(ranks.command_and_output, 1, "train", *settings)
    assert code == 2
    assert "train.init_from=" in output
