"""Averages made after training: against those kept directly, from weights whose every step is known; and refusals."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imm_scale import config as configs
from imm_scale.checkpoint import export, post_hoc_ema
from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint.format import Checkpoint, Meta
from imm_scale.checkpoint.post_hoc_ema import History
from imm_scale.errors import UserError
from imm_scale.parallel.ema import ShardedEma, power_function_exponent
from imm_scale.parallel.param_slice import ParamSlice
from tests import ranks
from tests.conftest import TINY

STEPS, EVERY, BATCH = 64, 8, 4096
WARM = ("ema.decays=[0.999999999,0.6875]", "ema.warmup=true")  # 0.6875 = 1 - 20 / 64, from step 22 on
SHAPES = {"a": (3, 4), "b": (2,)}


def _theta(step: int) -> torch.Tensor:
    """(14,), fp64: far from 0, drifting, and shaken by a sine whose pace differs from element to element."""
    element = torch.arange(14, dtype=torch.float64)
    return 5.0 + element * (step / STEPS) ** 2 + torch.sin(0.1 * (element + 1) * step)


def _direct(width: float, theta: np.ndarray, idle: Sequence[int] = ()) -> np.ndarray:
    """The average (...) of theta (n + 1, ...), whose index 0 holds initial weights, by the recursion itself in fp64."""
    average = theta[0]
    for i in range(1, len(theta)):
        decay = 1.0 if i in idle else (1 - 1 / i) ** (power_function_exponent(width) + 1)
        average = decay * average + (1 - decay) * theta[i]
    return average


def _bound(width: float, theta: np.ndarray, error: float, idle: Sequence[int] = ()) -> float:
    """Cauchy-Schwarz: profiles that add up to 1 and are `error` apart; and 1e-5 for sums of averages in fp32."""
    profile = _direct(width, np.eye(len(theta)), idle)
    spread = np.linalg.norm(theta - theta.mean(axis=0), axis=0).max()
    return error * np.linalg.norm(profile) * spread + 1e-5 * np.abs(theta).max()


def _slices(states: dict[str, torch.Tensor], rank: int) -> list[ParamSlice]:
    """A rank's of two: a[0:7], and a[7:12] with b."""
    cuts = [[("a", 0, slice(0, 7))], [("a", 7, slice(7, 12)), ("b", 0, slice(12, 14))]]
    return [
        ParamSlice(name, SHAPES[name], offset, {state: flat[cut].clone() for state, flat in states.items()})
        for name, offset, cut in cuts[rank]
    ]


def _run(folder: Path, *overrides: str, every: int = EVERY, idle: Sequence[int] = (), **changes: object) -> str:
    """A run folder's checkpoints, by two ranks' averages over `_theta`.

    Args:
        idle: neighbouring steps whose batches are stepped over.
        changes: of what the checkpoints say of themselves.
    """
    config = configs.load([], overrides).config
    parts = [_slices({"weight": _theta(0).float()}, rank) for rank in (0, 1)]
    emas = [ShardedEma(slices, config.ema.decays, config.ema_power) for slices in parts]
    skipped = ((BATCH * (min(idle) - 1), BATCH * max(idle)),) if idle else ()
    for step in range(1, STEPS + 1):
        for rank, (slices, ema) in enumerate(zip(parts, emas, strict=True)):
            for part, now in zip(slices, _slices({"weight": _theta(step).float()}, rank), strict=True):
                part.states["weight"].copy_(now.states["weight"])
            if step not in idle:
                ema.update(1 / step if config.ema.warmup else 0.0)
        if step % every == 0:
            url = checkpoints.folder(str(folder), step)
            for rank, ema in enumerate(emas):
                whole = [replace(s, states={k: (v,) for k, v in s.states.items()}) for s in ema.saved_slices()]
                checkpoints.write_rank(url, rank, whole, str(folder))
            taken = step - sum(other <= step for other in idle)
            meta = Meta(step, step * BATCH, taken, configs.to_yaml(config), "", "hash", 2, 1, {}, skipped=skipped)
            checkpoints.commit(url, replace(meta, **changes))
    return str(folder)


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> str:
    return _run(tmp_path_factory.mktemp("warm"), *WARM)


@pytest.mark.parametrize(
    ("step", "width"), [(None, 0.03), (None, 0.05), (None, 0.075), (None, 0.1), (None, 0.15), (None, 0.2), (40, 0.07)]
)
def test_an_average_comes_out_as_if_it_had_been_kept(step, width, warm, monkeypatch):
    monkeypatch.setattr(post_hoc_ema, "_CHUNK", 5)  # across the cut between ranks
    history = History(warm, step)
    fit = history.fit(width)
    theta = torch.stack([_theta(i) for i in range((step or STEPS) + 1)]).numpy()
    weights = post_hoc_ema.combine(history.stored, fit.coefficients)
    assert {name: tuple(value.shape) for name, value in weights.items()} == SHAPES
    made = torch.cat([weights["a"].flatten(), weights["b"]]).double().numpy()
    difference = np.abs(made - _direct(width, theta)).max()
    assert difference <= _bound(width, theta, fit.error)
    assert width != 0.1 or (fit.error < 1e-7 and difference < 1e-5), "it is one of those that were kept"


def test_plain_averages_span_what_their_lengths_allow(tmp_path):
    """Lengths of 8 and 16 steps, stored every 4: widths near 0.15 are theirs, narrow ones are not."""
    history = History(_run(tmp_path, "ema.decays=[0.875,0.9375]", every=4))
    theta = torch.stack([_theta(i) for i in range(STEPS + 1)]).numpy()
    fit = history.fit(0.15)
    history.check(0.15, fit)
    weights = post_hoc_ema.combine(history.stored, fit.coefficients)
    difference = np.abs(weights["b"].double().numpy() - _direct(0.15, theta)[12:]).max()
    assert difference <= _bound(0.15, theta, fit.error)
    with pytest.raises(UserError, match=r"--width 0\.01 .*out of reach of the 32 averages in 16 checkpoints .*0\.15"):
        history.check(0.01, history.fit(0.01))


def test_batches_that_were_stepped_over_weigh_nothing(tmp_path):
    idle = (55, 56, 57)
    history = History(_run(tmp_path, *WARM, idle=idle))
    left_alone = history._without_skipped(np.full((2, STEPS + 1), -1.0))
    assert np.argwhere(left_alone == 0.0).tolist() == [[kind, step] for kind in (0, 1) for step in idle]
    theta = torch.stack([_theta(i) for i in range(STEPS + 1)]).numpy()
    for width, most in ((0.075, 0.03), (0.1, 1e-7)):
        fit = history.fit(width)
        weights = post_hoc_ema.combine(history.stored, fit.coefficients)
        difference = np.abs(weights["b"].double().numpy() - _direct(width, theta, idle)[12:]).max()
        assert fit.error < most and difference <= _bound(width, theta, fit.error, idle)


# --- refusals ---


def test_one_average_is_too_few(tmp_path):
    run_dir = _run(tmp_path, "ema.decays=[0.9]", every=STEPS)
    with pytest.raises(UserError, match=r"holds 1 average, too few .*train\.keep_every"):
        History(run_dir)
    with pytest.raises(UserError, match="has no committed checkpoint of step 63; it has 64"):
        History(run_dir, 63)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((*WARM, "seed=1"), r"step-00000032 is of another run than .*step-00000064: seed is 1 there and 0 here"),
        (("ema.decays=[0.999999999,0.7]", "ema.warmup=true"), r"is of another run .*ema\.decays is"),
    ],
)
def test_checkpoints_of_two_runs_are_not_mixed(overrides, said, tmp_path):
    run_dir, other = _run(tmp_path / "run", *WARM, every=STEPS), _run(tmp_path / "other", *overrides, every=32)
    shutil.copytree(checkpoints.folder(other, 32), checkpoints.folder(run_dir, 32))
    with pytest.raises(UserError, match=said):
        History(run_dir)


def test_averages_that_changed_on_purpose_are_not_mixed(tmp_path):
    run_dir = _run(tmp_path / "run", *WARM, "run.allow_change=[ema]", every=STEPS)
    other = _run(tmp_path / "other", "ema.decays=[0.9,0.99]", every=32)
    shutil.copytree(checkpoints.folder(other, 32), checkpoints.folder(run_dir, 32))
    with pytest.raises(UserError, match=r"step-00000032 kept its averages otherwise .*Give a --step before the change"):
        History(run_dir)
    assert len(History(run_dir, 32).stored) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer_steps": 63}, "1 of 64 steps were skipped, and which ones is not recorded"),
        ({"images_seen": 63 * BATCH}, r"train\.global_batch_size changed on its way"),
    ],
)
def test_the_steps_of_averages_must_be_known(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        History(_run(tmp_path, *WARM, every=STEPS, **changes))


def test_a_checkpoint_that_goes_meanwhile_is_named(tmp_path):
    history = History(_run(tmp_path, *WARM, every=32))
    checkpoints.remove(checkpoints.folder(str(tmp_path), 32))
    with pytest.raises(UserError, match=r"the run has removed .*step-00000032 meanwhile"):
        post_hoc_ema.combine(history.stored, history.fit(0.05).coefficients)


# --- a run on the digits ---


@pytest.fixture(scope="module")
def kept(digits, tmp_path_factory) -> tuple[str, dict[str, np.ndarray]]:
    """A run of 12 steps with every third checkpoint, and the raw weights of all its steps, {parameter: (13, ...)}."""
    run_dir = str(tmp_path_factory.mktemp("kept") / "run")
    averages = ("ema.decays=[0.999999999,0.2]", "ema.warmup=true")
    saves = ("train.max_steps=12", "train.checkpoint_every=1", "train.keep_last=12")
    ranks.train(1, *TINY, f"data.manifest={digits}", f"run.dir={run_dir}", *averages, *saves)
    steps = [Checkpoint.of_step(run_dir, step).weights() for step in range(1, 13)]
    theta = {name: np.stack([steps[0][name], *(step[name] for step in steps)]).astype(float) for name in steps[0]}
    for step in set(range(1, 13)) - set(range(3, 13, 3)):
        checkpoints.remove(checkpoints.folder(run_dir, step))
    return run_dir, theta


def test_a_run_is_sampled_from_a_width_it_did_not_keep(kept, tmp_path):
    run_dir, theta = kept
    out = str(tmp_path / "width.safetensors")
    [(code, printed)] = ranks.run(ranks.command_and_output, 1, "export", run_dir, "--width", "0.07", "--out", out)
    assert code == 0 and "width 0.07 at step 12 from 8 averages in 4 checkpoints (steps 3 to 12)" in printed
    error = float(printed.split("off by ")[1].split()[0])
    made = export.read(out)[1]
    for name, values in theta.items():
        difference = np.abs(made[name].double().numpy() - _direct(0.07, values)).max()
        assert difference <= _bound(0.07, values, 1.01 * error), name  # two digits are printed
    flags = ("--steps", "1", "--num", "4", "--format", "npz", "--out", str(tmp_path / "samples"))
    assert ranks.run(ranks.command, 1, "sample", out, *flags) == [0]
    assert np.load(tmp_path / "samples" / "steps-1.npz")["arr_0"].shape[0] == 4
    with pytest.raises(UserError, match=r"holds the average of relative width 0\.07 alone, none of decay 0\.2"):
        export.read(out, ema=0.2)


def test_the_width_that_was_kept_is_the_average_that_was_kept(kept, tmp_path):
    run_dir, _ = kept
    post_hoc_ema.write(run_dir, str(tmp_path / "folder"), 0.10, step=9, format="diffusers")
    made, first = export.read(str(tmp_path / "folder"))[1], export.read(run_dir, step=9)[1]
    for name, value in first.items():
        torch.testing.assert_close(made[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("source", "flags", "said"),
    [
        ("run", ("--width", "0.5"), "--width 0.5 must lie between 0 and 0.289"),
        ("run", ("--width", "nan"), "--width nan must lie between"),
        ("run", ("--width", "0.1", "--ema", "0.2"), "give one of them"),
        ("run", ("--width", "0.1", "--step", "10"), "has no committed checkpoint of step 10; it has 3, 6, 9, 12"),
        ("run", ("--width", "0.01"), "--width 0.01 at step 12 is out of reach of the 8 averages in 4 checkpoints"),
        ("run/checkpoints/step-00000012", ("--width", "0.1"), "name the run folder, not"),
        ("net.safetensors", ("--width", "0.1"), "name the run folder, not"),
        ("nothing", ("--width", "0.1"), "it has none"),
    ],
)
def test_what_cannot_be_made_is_refused(source, flags, said, kept, tmp_path):
    place = Path(kept[0]).parent / source
    argv = ("export", str(place), *flags, "--out", f"{tmp_path}/out.safetensors")
    [(code, printed)] = ranks.run(ranks.command_and_output, 1, *argv)
    assert code == 2 and said in printed and "Traceback" not in printed
    assert not list(tmp_path.iterdir())
