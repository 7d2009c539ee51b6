"""The comparison of heads in small: four heads, a few steps, every figure and verdict of the page from the runs."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import common
from experiments.joint_tokens import claims, data, hands, page, study
from experiments.joint_tokens.prediction import Prediction
from imm_scale import cli
from imm_scale.data.dataset import Dataset
from imm_scale.evaluation.tokens.profile import nodes, schedule_costs
from imm_scale.models.heads import HeadConfig
from launchers import sweep
from tests.unit.methods.tokens import toy

SIZES = {"model.width": 16, "model.heads": 2, "evaluation.num": 12, "sampling.num": 1, "method.steps": [1, 4]}
STEPS = (1, 4, 64)


def _here(*words: str) -> None:
    """A command of this package in this process, and all cells from one fork server: starting takes the longest."""
    {"imm_scale": cli.main, "launchers.sweep": sweep.main}[words[0]](words[1:])


def _few(manifest: Path, folder: Path) -> dict[str, str]:
    """The first 32 held-out digits: the page scores all there are in every order."""
    dataset = Dataset(str(manifest))
    data._write(folder, np.asarray(dataset.gather(np.arange(32))), dataset.manifest.token_codec)
    return {"data.holdout_manifest": str(folder / "manifest.json")}


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "run", _here)
        yield


@pytest.fixture(scope="module")
def small(here: None, tmp_path_factory: pytest.TempPathFactory) -> study.Study:
    """A study of digits that has been run: a net of two steps, and two more by each head on it."""
    folder = tmp_path_factory.mktemp("joint_tokens")
    full = study.TASKS["digits"]
    settings = {**full.settings, **SIZES, **study._lasting(2, 8), "evaluation.steps": list(STEPS)}
    rows = {name: full.rows[name] for name in claims.ORDER}
    before = {**full.before, **study._lasting(2, 8)}
    task = dataclasses.replace(full, steps=STEPS, rows=rows, settings=settings, before=before)
    named = data.make("digits", folder / "data") | _few(folder / "data" / "heldout" / "manifest.json", folder / "few")
    made = study.Study(task, folder / "runs", named, seeds=(3,))
    made.run(1)
    return made


def test_all_heads_start_from_one_net(small):
    there = {small.outcomes[name, 3].cell.config.train.init_from for name in claims.ORDER}
    assert there == {str(small.folder / "digits_before" / "runs" / "factorized-seed3")}
    assert all(one.state == "finished" and one.step == 2 for one in small.outcomes.values())


def test_the_page_has_what_was_measured(small, tmp_path):
    text = page.write({"digits": small}, None, tmp_path).read_text()
    for name in claims.ORDER:
        (row, *_) = (line for line in text.splitlines() if line.startswith(f"| {small.task.rows[name].title} |"))
        for steps in STEPS:
            values = small.values(name, 3, steps)
            assert values.shape == (12,)
            # the evaluation's mean is of the same values, over 64 tokens
            assert small.result(name, 3, steps)["mean"] * 64 == pytest.approx(values.mean(), rel=1e-12)
            assert f"{values.mean():.2f} ± 0.00" in row
    assert "**Holds**" in text or "**Does not hold**" in text
    for picture in ("quality", "samples"):
        assert (tmp_path / f"images/joint_tokens/{picture}.png").stat().st_size > 5_000


def test_run_again_it_has_nothing_to_do(small, monkeypatch, capfd):
    def run(*words):
        commands.append(words[:2])

    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(common, "run", run)
    small.run(1)
    assert commands == [("launchers.sweep", "submit"), ("launchers.sweep", "retry")] * 2


def test_best_sizes_are_measured_on_the_half_they_were_not_fitted_to(small):
    """Against the evaluation's own crossing of the halves, on the same scores."""
    net = Prediction(small.outcomes["factorized", 3].cell.run_dir, 2)
    found = net.in_sizes([1, 4, 64])
    for kind in ("uniform", "cosine", "best"):
        assert np.array_equal(found[1][kind], found[1]["uniform"]), "one pass has one schedule"
        # sums of 64 fp64 numbers of order 1
        assert found[64][kind] == pytest.approx(net.one_at_a_time.sum(axis=1), rel=1e-12)
    costs = {(cost.kind, cost.steps): cost.nll.value for cost in schedule_costs(net.scores, [4])}
    for kind, nats_N in found[4].items():
        assert nats_N.mean() == pytest.approx(costs[kind, 4], rel=1e-12)


@pytest.fixture(scope="module")
def larger(here: None, tmp_path_factory: pytest.TempPathFactory) -> study.Study:
    """A study of larger digits that has been run: two steps of the product head."""
    folder = tmp_path_factory.mktemp("larger")
    full = study.TASKS["mnist"]
    steps = [1, 2, 8]
    settings = {**full.settings, **SIZES, **study._lasting(2, 8), "evaluation.steps": steps, "method.steps": []}
    named = data.make("mnist", folder / "data") | _few(folder / "data" / "heldout" / "manifest.json", folder / "few")
    task = dataclasses.replace(full, steps=tuple(steps), settings=settings)
    made = study.Study(task, folder / "runs", named, seeds=(3,))
    made.run(1)
    return made


def test_sizes_on_the_page_are_those_of_the_profile(larger, tmp_path):
    text = page.write({"mnist": larger}, None, tmp_path).read_text()
    net = Prediction(larger.outcomes["factorized", 3].cell.run_dir, 1)
    # every number of visible tokens is between two that are scored, whose lines the sums are over
    assert net._score_table.shape == (32, len(nodes(400))) and net.one_at_a_time.shape == (32, 400)
    alone, found = net.one_at_a_time.sum(axis=1), net.in_sizes([8])[8]
    for kind, words in (("uniform", "equal"), ("cosine", "cosine"), ("best", "best")):
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {words} sizes |"))
        assert row.endswith(f"| {(found[kind] - alone).mean():.2f} ± 0.00 |")
    (sizes,) = (part.split(": ")[1] for part in re.findall(r"8: [\d, ]+", text))
    assert sum(map(int, sizes.split(", "))) == 400 and sizes.count(",") == 7
    for picture in ("sizes", "sizes_samples"):
        assert (tmp_path / f"images/joint_tokens/{picture}.png").stat().st_size > 5_000


def test_larger_digits_are_the_middle_of_their_images(larger):
    packed = Path(larger.data["data.manifest"]).parent
    whole, middle = (Dataset(str(folder / "manifest.json")) for folder in (packed / "with_classes", packed))
    ids = np.asarray(whole.gather(np.arange(len(whole)))).reshape(-1, 28, 28)
    assert np.array_equal(np.asarray(middle.gather(np.arange(len(middle)))), ids[:, 4:24, 4:24].reshape(-1, 400))
    assert middle.manifest.token_codec.image_shape == (20, 20)


# --- verdicts, of numbers that are made up ---


def _made_up(nats):
    """A study with these values (N,) by head, from the second seed a tenth more; the floor is 8 nats of 2 tokens."""
    return SimpleNamespace(
        seeds=(0, 1),
        task=SimpleNamespace(steps=(1, 2)),
        values=lambda head, seed, steps, name="nll": (1 + seed / 10) * nats[head],
        result=lambda head, seed, steps: {"mean": nats[head].mean() / 2, "error": 0.01},
        measure=lambda head, seed, steps, name: (4.0, 0.01),
    )


def test_verdicts_follow_the_numbers():
    noise = np.random.default_rng(0).normal(size=200)
    nats = {head: 10 - rank + 3 * noise for rank, head in enumerate(claims.ORDER)}
    nats["chain"] = nats["chain"] + 0.1 * noise[::-1]
    found = claims.order(_made_up(nats), 1)
    # what samples share cancels: gaps of 1 with errors of 0, and of 0.1 std / sqrt(200)
    assert found.holds and f"mixture - chain 1.00 ± {0.1 * noise.std(ddof=1) / 200**0.5:.2f}" in found.measured
    worse = {**nats, "chain": nats["mixture"] + 0.2 * noise[::-1]}
    assert not claims.order(_made_up(worse), 1).holds and str(claims.order(_made_up(worse), 1)).startswith(
        "- **Does not"
    )
    assert claims.floor(_made_up(nats)).holds, "the product head has 10 nats"
    assert not claims.floor(_made_up({**nats, "factorized": nats["factorized"] - 3})).holds
    assert claims.below_the_floor(_made_up(nats), "autoregressive").holds
    assert not claims.below_the_floor(_made_up({**nats, "chain": nats["factorized"] + noise[::-1]}), "chain").holds
    gaps = claims.gaps(_made_up(nats), 1)["factorized", "mixture"]
    assert [gap for gap, _ in gaps] == pytest.approx([1.0, 1.1], rel=1e-9), "each seed by its own numbers"
    for factor, holds in ((1.005, True), (0.98, False)):
        assert claims.prediction({(0, 2): (factor * nats["chain"], nats["chain"])}).holds == holds
    few = 0.01 * noise[::-1]
    ahead, behind = ({"uniform": 10 + noise, "best": 10 + noise - gain + few} for gain in (0.1, -0.1))
    assert claims.best_sizes({(0, 2): ahead, (1, 4): ahead}, 5.0).holds
    assert not claims.best_sizes({(0, 2): ahead, (1, 4): behind}, 5.0).holds
    level = {"uniform": 10 + noise, "best": 10 + noise + few - few.mean()}
    assert claims.best_sizes({(0, 2): level}, -2.0).holds and not claims.best_sizes({(0, 2): level}, 5.0).holds
    assert not claims.best_sizes({(0, 2): behind}, -2.0).holds


@pytest.mark.parametrize(("kind", "components"), [("factorized", 1), ("autoregressive", 1), ("uniform_conditioned", 1)])
def test_laws_of_hands_add_up(kind, components, monkeypatch):
    net = toy.token_net(2, 3, causal=False, head=HeadConfig(kind, components))
    monkeypatch.setattr(hands, "load_net", lambda run_dir: (None, net))
    once, twice = hands.law("run", 1), hands.law("run", 2)
    # products of each point of the grid add up to 1; the uniform-conditioned head embeds uniforms in fp32
    assert once.sum() == pytest.approx(1, abs=1e-6) and twice.sum() == pytest.approx(1, abs=1e-6)
    product = once.sum(axis=1, keepdims=True) * once.sum(axis=0, keepdims=True)
    assert (np.abs(once - product).max() < 1e-9) == (kind == "factorized")
    assert np.abs(once - twice).max() > 1e-3


def test_numbers_of_hands():
    """Of a product of uniform words: KL log 4, validity 1/4."""
    assert hands.divergence(np.full((4, 4), 1 / 16)) == pytest.approx(np.log(4), rel=1e-12)
    assert hands.validity(np.full((4, 4), 1 / 16)) == pytest.approx(0.25, rel=1e-12)
    assert hands.divergence(np.eye(4) / 4) == pytest.approx(0, abs=1e-12)
