"""A run saved on some ranks and ZeRO stage goes on with others as if it had never stopped."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from imm_scale import build
from imm_scale import config as configs
from imm_scale.checkpoint.averages import initial_share
from imm_scale.checkpoint.format import Checkpoint, folder
from imm_scale.data.manifest import Manifest
from imm_scale.parallel.ema import WARMUP_WIDTH, power_function_exponent
from tests import ranks, small_tokens
from tests.conftest import ANY_METHOD, TINY, losses

SOAK = int(os.environ.get("IMM_SOAK", "1")) > 1  # as `make soak` sets it
World = tuple[int, int]  # ranks, ZeRO stage
WORLDS: list[World] = [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (3, 1), (4, 3)]
ALL_PAIRS = [(first, second) for first in WORLDS for second in WORLDS]
# Every world saves and every world loads, with more and with fewer ranks, to and from stage 3.
SUBSET = [(WORLDS[i], WORLDS[(i + 3) % 7]) for i in range(7)] + [((2, 3), (2, 3))]
FIRST, LAST = 10, 20


def _argv(digits: str, run_dir: Path, world: World, max_steps: int) -> list[str]:
    # An epsilon above the rounding of the gradients, as in the test of equal losses.
    settings = [f"zero.stage={world[1]}", f"train.max_steps={max_steps}", "optimizer.eps=1e-4", "train.grad_clip=0.1"]
    return [*TINY, f"data.manifest={digits}", f"run.dir={run_dir}", *settings]


def _name(world: World) -> str:
    return f"{world[0]}-{world[1]}"


def _train_each(runs: list[tuple[World, list[str]]]) -> None:
    for size in sorted({world[0] for world, _ in runs}):
        ranks.train_each(size, [argv for world, argv in runs if world[0] == size])


@pytest.fixture(scope="module")
def saved(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps by every world, and one that was never interrupted."""
    root = tmp_path_factory.mktemp("saved")
    runs = [(world, _argv(digits, root / _name(world), world, FIRST)) for world in WORLDS]
    _train_each([*runs, ((1, 0), _argv(digits, root / "whole", (1, 0), LAST))])
    return root


def test_every_world_goes_on_with_what_every_other_saved(digits, tmp_path, saved):
    pairs = ALL_PAIRS if SOAK else SUBSET
    runs = []
    for first, second in pairs:
        run_dir = tmp_path / f"{_name(first)}-{_name(second)}"
        shutil.copytree(saved / _name(first), run_dir)
        runs.append((second, _argv(digits, run_dir, second, LAST)))
    _train_each(runs)
    whole = np.array(losses(saved / "whole"))
    worst = 0.0
    for first, second in pairs:
        run_dir = tmp_path / f"{_name(first)}-{_name(second)}"
        curve = np.array(losses(run_dir))
        assert len(curve) == LAST
        worst = max(worst, float(np.max(np.abs(curve / whole - 1.0))))
        # fp32 sums in another order.
        np.testing.assert_allclose(curve, whole, rtol=1e-5, err_msg=f"{first} -> {second}")
        meta = Checkpoint.latest(str(run_dir)).meta
        assert meta.optimizer_steps == LAST and (meta.world_size, meta.zero_stage) == second
    print(f"{len(pairs)} pairs, largest relative difference of a loss {worst:.2g}")


def test_starting_the_optimizer_or_the_weights_anew_would_be_seen(digits, tmp_path, saved):
    """The curve of the matrix can tell a resume from one that lost the moments."""
    run_dir = tmp_path / "run"
    shutil.copytree(saved / "1-0", run_dir)
    export = tmp_path / "weights.safetensors"
    assert ranks.command("export", str(run_dir), "--ema", "0", "--out", str(export)) == 0
    argv = _argv(digits, tmp_path / "anew", (1, 0), FIRST)
    ranks.train_each(1, [[*argv, f"train.init_from={export}"]])
    whole = np.array(losses(saved / "whole"))
    assert np.max(np.abs(np.array(losses(tmp_path / "anew")) / whole[:FIRST] - 1.0)) > 1e-3


def test_another_precision_and_micro_batch_go_on_as_well(digits, tmp_path, saved):
    run_dir = tmp_path / "run"
    shutil.copytree(saved / "2-1", run_dir)
    # The gap is the run's: without it bf16 would choose its own, and the resume be refused.
    other = ["precision=bf16", "method.min_gap=0", "train.micro_batch_size=8"]
    ranks.train_each(2, [[*_argv(digits, run_dir, (2, 2), LAST), *other]])
    whole, curve = np.array(losses(saved / "whole")), np.array(losses(run_dir))
    np.testing.assert_allclose(curve[:FIRST], whole[:FIRST], rtol=1e-5)
    np.testing.assert_allclose(curve, whole, rtol=1e-2)  # of the order of bf16's 8 bits
    assert np.max(np.abs(curve[FIRST:] / whole[FIRST:] - 1.0)) > 1e-5, "it did not compute in bf16"


def test_token_nets_go_on_in_other_worlds(tmp_path):
    """Draws and heads know of no ranks: saved by two at stage 2, gone on with by one and by three at stage 3."""
    manifest = small_tokens.binary_digits(tmp_path / "data", last=512)
    net = [*small_tokens.NET, "method.name=masked", "method.steps=[1,4,16]", "model.head.kind=chain"]
    common = [*ANY_METHOD, *net, "model.head.components=3", "optimizer.eps=1e-4", f"data.manifest={manifest}"]

    def argv(name: str, stage: int, max_steps: int) -> list[str]:
        return [*common, f"zero.stage={stage}", f"train.max_steps={max_steps}", f"run.dir={tmp_path / name}"]

    ranks.train_each(1, [argv("whole", 0, 6)])
    ranks.train_each(2, [argv("one", 2, 3)])
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    ranks.train_each(1, [argv("one", 0, 6)])
    ranks.train_each(3, [argv("three", 3, 6)])
    for name in ("one", "three"):
        # fp32 sums in another order.
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "whole"), rtol=1e-5, err_msg=name)


# --- averages ---

CHAIN: list[World] = [(1, 0), (2, 1), (3, 2), (2, 3), (2, 0), (1, 3)]
DECAYS = (0.9, 0.99)
STEPS_EACH = 3


def test_averages_equal_those_of_a_single_process_at_every_stage_and_after_resume(digits, tmp_path):
    """One run handed from world to world, saving every step: averages made from its whole weights in fp64."""
    run_dir = tmp_path / "run"
    common = ["train.checkpoint_every=1", "train.keep_last=100", f"ema.decays={list(DECAYS)}"]
    for number, world in enumerate(CHAIN, 1):
        argv = [*_argv(digits, run_dir, world, number * STEPS_EACH), *common]
        ranks.train_each(world[0], [argv])
    config = configs.load([], [*_argv(digits, run_dir, (1, 0), 1), *common]).config
    net = build.net(build.model_spec(config, Manifest.load(digits)), config.seed).model
    plain = {decay: {name: p.detach().double() for name, p in net.named_parameters()} for decay in DECAYS}
    for step in range(1, len(CHAIN) * STEPS_EACH + 1):
        checkpoint = Checkpoint(folder(str(run_dir), step))
        assert checkpoint.meta.zero_stage == CHAIN[(step - 1) // STEPS_EACH][1]
        weights = checkpoint.weights()
        for decay, average in plain.items():
            saved = checkpoint.weights(f"ema-{decay:g}")
            for name, weight in weights.items():
                average[name] = decay * average[name] + (1.0 - decay) * weight.double()
                # fp32 lerps, 18 of them: each rounds by 6e-8 of values below 1.
                torch.testing.assert_close(saved[name].double(), average[name], rtol=1e-6, atol=1e-6)
    moved = max(float((plain[0.9][name] - plain[0.99][name]).abs().max()) for name in plain[0.9])
    assert moved > 1e-3, "averages that do not differ would prove nothing"


def test_averages_that_start_short_follow_the_clock_on_any_ranks_and_over_restarts(digits, tmp_path):
    """ema.warmup: after n steps, step i weighs (i/n)^p - ((i-1)/n)^p, and the initial weights nothing."""
    run_dir, p = tmp_path / "run", power_function_exponent(WARMUP_WIDTH) + 1.0
    for steps, world in ((2, (1, 0)), (4, (2, 1))):
        more = ["train.checkpoint_every=1", "train.keep_last=100", "ema.warmup=true"]
        ranks.train_each(world[0], [[*_argv(digits, run_dir, world, steps), *more]])
    taken = [Checkpoint(folder(str(run_dir), step)) for step in (1, 2, 3, 4)]
    for name, average in taken[-1].weights("ema-0.99").items():
        expected = sum(((i / 4) ** p - ((i - 1) / 4) ** p) * c.weights()[name].double() for i, c in enumerate(taken, 1))
        # Four fp32 lerps of values below 1, each off by 6e-8 at most.
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-6)
    assert initial_share(taken[-1], 0.99) == 0.0
