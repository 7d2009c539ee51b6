"""Nothing is silent: every fault ends as it should, named with its rank, within its bound."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from imm_scale.checkpoint.format import Checkpoint, committed_steps
from imm_scale.checkpoint.run_folder import read_metrics, read_status
from tests import ranks
from tests.conftest import TINY
from tests.resume import faults
from tests.resume.test_resume import _wait_for_step

BOUND = 60.0  # seconds from a hang to the end of the job: 8 of deadline, 2 of liveness check, and a busy machine


def _settings(digits: str, run_dir: Path, *more: str) -> list[str]:
    return ["train", *TINY, f"data.manifest={digits}", f"run.dir={run_dir}", "train.checkpoint_every=1000", *more]


def _log(run_dir: Path, rank: int = 0) -> str:
    return (run_dir / "logs" / f"rank-{rank:05d}.log").read_text()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_nan_gradient_and_an_inf_sample_are_skipped_counted_and_named(stage, digits, tmp_path):
    run_dir = tmp_path / "run"
    settings = _settings(digits, run_dir, "train.max_steps=7", f"zero.stage={stage}")
    assert ranks.run(faults.nan_gradient_and_inf_batch, 2, *settings) == [0, 0]
    for rank in (0, 1):
        log = _log(run_dir, rank)
        assert "step 3 is skipped (1 in a row): the gradient is not finite on rank 1 (" in log
        # Rank 1 has groups 8 to 15 of the 16 of each step: its third one at step 5 is 4 * 16 + 8 + 2.
        assert "step 5 is skipped (1 in a row): the loss is not finite on rank 1 (" in log
        assert "), group 74" in log
        assert log.count("is skipped") == 2
    last = read_metrics(str(run_dir))[-1]
    causes = ("non_finite_gradient", "non_finite_loss", "overflow")
    assert (last["skipped_steps"], *(last[f"skipped_{cause}"] for cause in causes)) == (2, 1, 1, 0)
    assert [r["loss"] is None for r in read_metrics(str(run_dir))] == [step in (3, 5) for step in range(1, 8)]
    checkpoint = Checkpoint.latest(str(run_dir))
    assert (checkpoint.meta.step, checkpoint.meta.optimizer_steps) == (7, 5)
    for state in checkpoint.states:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint.weights(state).values())


def test_a_run_that_only_skips_ends_with_the_reason(digits, tmp_path):
    run_dir = tmp_path / "run"
    settings = _settings(digits, run_dir, "train.max_consecutive_skips=4")
    for code, output in ranks.run(faults.nan_for_ever, 2, *settings):
        assert code == 1
        assert "4 steps in a row were skipped (train.max_consecutive_skips), the last at step 6" in output
        assert "Traceback" not in output
    status = read_status(str(run_dir))
    assert status["state"] == "failed"
    assert "not finite on rank 1" in status["reason"]


def test_a_spike_rewinds_and_steps_over_its_batch(digits, tmp_path):
    schedule = ["train.max_steps=26", "train.checkpoint_every=10", "train.log_every=2", "zero.stage=2"]
    settings = _settings(digits, tmp_path / "run", *schedule, "train.spike_factor=20")
    assert [code for code, _ in ranks.run(faults.spikes_after_a_failed_save, 2, [23], 10, *settings)] == [0, 0]
    assert ranks.run(faults.stepping_over, 2, 23, *_settings(digits, tmp_path / "reference", *schedule)) == [0, 0]
    assert "step 23 spikes: the loss" in _log(tmp_path / "run")
    assert "Going back to step 20 and stepping over images 1408 to 1472" in _log(tmp_path / "run")
    a, b = (Checkpoint.latest(str(tmp_path / name)) for name in ("run", "reference"))
    assert a.meta.skipped == ((22 * 64, 23 * 64),)
    assert (a.meta.step, a.meta.optimizer_steps) == (b.meta.step, b.meta.optimizer_steps) == (26, 25)
    for state in a.states:
        for name, tensor in a.weights(state).items():
            assert torch.equal(tensor, b.weights(state)[name]), f"{state} of {name} differs"
    records = read_metrics(str(tmp_path / "run"))
    assert [record["step"] for record in records] == list(range(2, 27, 2)), "every step once, though some ran twice"
    assert [r["loss"] for r in records] == [r["loss"] for r in read_metrics(str(tmp_path / "reference"))]
    assert records[-1]["stepped_over_images"] == 64
    assert records[-1]["failed_checkpoints"] == 1, "saves that failed before the rewind count on"


def test_rewinds_are_bounded(digits, tmp_path):
    schedule = ["train.max_steps=40", "train.checkpoint_every=18", "train.max_rewinds=1", "train.spike_factor=20"]
    settings = _settings(digits, tmp_path / "run", *schedule)
    for code, output in ranks.run(faults.spikes, 2, list(range(19, 40)), *settings):
        assert code == 1
        assert "1 rewinds to step 18 did not help (train.max_rewinds)" in output
    assert committed_steps(str(tmp_path / "run")) == [18]
    assert read_status(str(tmp_path / "run"))["state"] == "failed"


def test_a_micro_batch_that_is_too_large_says_what_to_do(digits, tmp_path):
    run_dir = tmp_path / "run"
    settings = _settings(digits, run_dir, "train.micro_batch_size=16", "zero.stage=2", "train.step_timeout=600")
    started = ranks.start(faults.out_of_memory, 2, *settings)
    try:
        pipe = started[1][1]
        assert pipe.poll(BOUND), "rank 1 does not wait for rank 0, which its launcher will end"
        worked, (code, output) = pipe.recv()
    finally:
        for process, _ in started:
            process.kill()
    assert worked and code == 2, output
    assert "Tried to" not in output and "Traceback" not in output
    status = read_status(str(run_dir))
    assert status["state"] == "failed" and status["rank"] == 1
    for text in (output, status["reason"], _log(run_dir, 1)):
        assert "CUDA out of memory" in text
        assert "a smaller train.micro_batch_size (a rank runs 16 samples at once)" in text
        assert "train.activation_checkpointing=true; a higher zero.stage (now 2); zero.offload=optimizer" in text


def _assert_ended_by_the_watchdog(run_dir: Path, survivors: list, began: float) -> dict:
    for process, _ in survivors:
        process.join(BOUND)
        assert process.exitcode == 1
    assert time.monotonic() - began < BOUND
    status = read_status(str(run_dir))
    assert status["state"] == "failed"
    log = _log(run_dir, 0)
    assert "is past its deadline of 8 s: rank 0 (" in log
    assert "last collective: gloo:" in log
    assert 'File "' in log and "in _step" in log, "the stacks of all threads"
    return status


def test_a_stopped_rank_is_named_by_the_others(digits, tmp_path):
    run_dir = tmp_path / "run"
    started = ranks.start(ranks.command, 3, *_settings(digits, run_dir, "train.step_timeout=8"))
    try:
        _wait_for_step(run_dir, 3)
        began = time.monotonic()
        os.kill(started[1][0].pid, signal.SIGSTOP)
        status = _assert_ended_by_the_watchdog(run_dir, [started[0], started[2]], began)
        assert status["reason"].startswith("rank 1 (")
        assert "does not answer" in status["reason"]
        assert started[1][0].is_alive()
    finally:
        for process, _ in started:
            process.kill()


def test_a_rank_that_waits_for_data_is_named_by_what_it_does(digits, tmp_path):
    run_dir = tmp_path / "run"
    started = ranks.start(faults.sleeps_in_the_loader, 2, *_settings(digits, run_dir, "train.step_timeout=8"))
    try:
        _wait_for_step(run_dir, 3)
        status = _assert_ended_by_the_watchdog(run_dir, started, time.monotonic())
        assert status["reason"].startswith("rank 1 (")
        assert "has been in step 4, reading data, for" in status["reason"]
        assert "in sleep" in _log(run_dir, 1), "the stack says where"
    finally:
        for process, _ in started:
            process.kill()
    answers = [json.loads(path.read_text()) for path in (run_dir / "watchdog").glob("*/*.json")]
    assert sorted(answer["rank"] for answer in answers) == [0, 1]
