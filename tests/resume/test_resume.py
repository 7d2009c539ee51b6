"""A run that is killed, stopped or spread anew goes on as if nothing had happened."""

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from imm_scale.checkpoint.format import COMMITTED, Checkpoint, committed_steps, folder
from imm_scale.data.loader import Batch, Loader
from imm_scale.data.sample_order import Layout
from tests import ranks, small_tokens
from tests.conftest import ANY_METHOD, TINY, losses

STEPS = 20
METHODS = Path(__file__).parents[2] / "configs" / "method"


@pytest.fixture(scope="module")
def undisturbed(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    ranks.train(2, *_settings(digits, run_dir))
    return run_dir


def _settings(digits: str, run_dir: Path) -> list[str]:
    steps = [f"train.max_steps={STEPS}", "train.checkpoint_every=5", "zero.stage=1"]
    return [*TINY, f"data.manifest={digits}", f"run.dir={run_dir}", *steps]


def _wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def _assert_same_states(first: Path, second: Path) -> None:
    a, b = Checkpoint.latest(str(first)), Checkpoint.latest(str(second))
    assert a.meta.step == b.meta.step == STEPS
    assert a.states == b.states == ["ema-0.99", "exp_avg", "exp_avg_sq", "weight"]
    for state in a.states:
        for name, tensor in a.weights(state).items():
            assert torch.equal(tensor, b.weights(state)[name]), f"{state} of {name} differs"


def test_sigkill_and_restart_end_in_the_same_bits(digits, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    started = ranks.start(ranks.command, 2, "train", *_settings(digits, run_dir))
    _wait_for_step(run_dir, 10)
    for process, _ in started:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert committed_steps(str(run_dir))[-1] in (5, 10, 15)
    ranks.train(2, *_settings(digits, run_dir))
    _assert_same_states(run_dir, undisturbed)
    assert losses(run_dir) == losses(undisturbed)


@pytest.mark.parametrize("method", ["meanflow", "soflow", "tvm", "blocks", "block_mixer"])
def test_other_methods_are_killed_and_restarted_to_the_same_bits(method, digits, tmp_path):
    """A tangent that only some samples have, a step that shrinks with the clock, an average that sets the target.

    And IMM with samples of four blocks, a net with dropout that is given diffused ones, with branches through the
    transformer or beside it.
    """

    def settings(name: str) -> list[str]:
        schedule = [f"method.schedule_images={64 * STEPS}"] if method == "soflow" else []
        argv = [*ANY_METHOD, *schedule, f"train.max_steps={STEPS}", "train.checkpoint_every=5", "zero.stage=2"]
        blocks = ["model.blocks=4", "model.dropout=0.1", "method.context_noise=0.1"]
        mlp = [*blocks, "model.branch=mlp", "method.replicas=2"]
        own = {"blocks": blocks, "block_mixer": mlp}.get(method, [str(METHODS / f"{method}.yaml")])
        return [*own, *argv, f"data.manifest={digits}", f"run.dir={tmp_path / name}"]

    _kill_and_restart(settings, tmp_path)


TOKEN_NETS = {
    "masked": ["method.name=masked", "method.steps=[1,4]", "model.head.kind=autoregressive", "model.dropout=0.1"],
    "next_block": [
        "method.name=next_block",
        "model.causal=true",
        "model.block=4",
        "model.head.kind=uniform_conditioned",
    ],
}


@pytest.mark.parametrize("net", TOKEN_NETS)
def test_token_nets_are_killed_and_restarted_to_the_same_bits(net, tmp_path):
    manifest = small_tokens.binary_digits(tmp_path / "data", last=512)

    def settings(name: str) -> list[str]:
        argv = [*ANY_METHOD, *small_tokens.NET, *TOKEN_NETS[net], f"train.max_steps={STEPS}", "zero.stage=2"]
        return [*argv, "train.checkpoint_every=5", f"data.manifest={manifest}", f"run.dir={tmp_path / name}"]

    _kill_and_restart(settings, tmp_path)


def _kill_and_restart(settings: Callable[[str], list[str]], folder: Path) -> None:
    """A run that is killed in the middle and goes on against one that is not, for the words of a run of a name."""
    ranks.train(2, *settings("whole"))
    started = ranks.start(ranks.command, 2, "train", *settings("killed"))
    _wait_for_step(folder / "killed", 10)
    for process, _ in started:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    ranks.train(2, *settings("killed"))
    _assert_same_states(folder / "killed", folder / "whole")
    assert losses(folder / "killed") == losses(folder / "whole")


def test_sigterm_commits_and_leaves_with_75(digits, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    settings = [*_settings(digits, run_dir), "train.checkpoint_every=1000"]
    started = ranks.start(ranks.command, 2, "train", *settings)
    _wait_for_step(run_dir, 3)
    os.kill(started[1][0].pid, signal.SIGTERM)  # one rank hears it, all of them leave
    assert ranks.join(started) == [75, 75]
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "preempted"
    assert committed_steps(str(run_dir)) == [status["step"]]
    ranks.train(2, *settings)
    _assert_same_states(run_dir, undisturbed)


def _consumed(argv: list[str]) -> dict[int, bytes]:
    """Trains as one rank and returns what it took from the loader, by ordinal."""
    taken: dict[int, bytes] = {}
    plain = Loader.__next__

    def noting(loader: Loader) -> Batch:
        batch = plain(loader)
        rows = _rows(batch)
        assert not rows.keys() & taken.keys()
        taken.update(rows)
        return batch

    Loader.__next__ = noting
    assert ranks.command("train", *argv) == 0
    return taken


def _rows(batch: Batch) -> dict[int, bytes]:
    """Values and label of every sample that is not padding."""
    real = batch.weight.repeat_interleave(len(batch.x) // len(batch.weight)) > 0
    rows = zip(batch.ordinal[real].tolist(), batch.x[real], batch.condition[real].tolist(), strict=True)
    return {ordinal: x.numpy().tobytes() + bytes([label]) for ordinal, x, label in rows}


def test_two_ranks_then_one_then_four_take_the_very_next_samples(digits, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    taken: dict[int, bytes] = {}
    begun = 0
    for size, until in ((2, 7), (1, 12), (4, STEPS)):
        settings = [*_settings(digits, run_dir), f"train.max_steps={until}"]
        parts = ranks.run(_consumed, size, settings)
        together = {ordinal: row for part in parts for ordinal, row in part.items()}
        assert sorted(together) == list(range(64 * begun, 64 * until)) and sum(map(len, parts)) == len(together)
        taken |= together
        begun = until
    with Loader(digits, Layout(64, 4, 1, 64), rank=0, seed=0) as loader:  # one reader that never stops, and no training
        assert taken == {k: row for batch in itertools.islice(loader, STEPS) for k, row in _rows(batch).items()}
    # The same fp32 sums in another order, as in the test of equal losses.
    np.testing.assert_allclose(losses(run_dir), losses(undisturbed), rtol=1e-4)


def test_a_finished_run_is_left_alone(undisturbed, digits):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    ranks.train(1, *_settings(digits, undisturbed))
    after = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert before == after


def test_uncommitted_and_damaged_checkpoints_are_passed_over(digits, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    ranks.train(2, *_settings(digits, run_dir))
    (Path(folder(str(run_dir), 20)) / COMMITTED).unlink()
    damaged = Path(folder(str(run_dir), 15)) / "rank-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    ranks.train(2, *_settings(digits, run_dir))
    for rank in range(2):
        log = (run_dir / "logs" / f"rank-0000{rank}.log").read_text()
        assert "checkpoint of step 20 is skipped: it was never committed" in log
        assert "checkpoint of step 15 is skipped, it is damaged: rank-00001.safetensors (rank 1)" in log
    _assert_same_states(run_dir, undisturbed)
