"""The comparison of flow maps in small: three methods, a dozen steps each, every figure of the page from their runs."""

import dataclasses
import json

import pytest

from experiments import common
from experiments.flow_maps import page, study
from imm_scale.errors import UserError
from imm_scale.evaluation.records import read_evaluations

ROWS = ("flow_matching", "imm", "soflow")
UNITS = 64 * 4 * 12  # 12 steps of IMM


@pytest.fixture(scope="module")
def small(digits: str, tmp_path_factory: pytest.TempPathFactory) -> study.Study:
    """A study that has been run; its times are given, for all methods would have to be timed."""
    folder = tmp_path_factory.mktemp("flow_maps")
    settings = {"data.manifest": digits, "optimizer.warmup_images": 64, "evaluation.num": 100, "evaluation.repeats": 1}
    protocol = dataclasses.replace(study.SMALL, units=UNITS, seeds=(0, 1))
    made = study.Study(study.DataSet("digits", "a few digits", settings), protocol, folder, ROWS)
    made.run(1)
    (folder / "times.json").write_text(json.dumps({"flow_matching": 1.0, "imm": 1.5, "soflow": 1.25}))
    return made


def test_rows_spend_the_same(small):
    """Steps times images times forward passes: 3, 4, and 3 + 1 on a quarter; a run is four checkpoints long."""
    for name, forwards in zip(ROWS, (3.0, 4.0, 3.25), strict=True):
        config = small.runs(name)[0].outcome.cell.config
        assert config.train.max_steps * 64 * forwards == pytest.approx(UNITS, rel=0.5 * 4 / config.train.max_steps)
        assert config.train.keep_every * 4 == config.train.max_steps
        assert getattr(config.method, "schedule_images", None) in (None, 64 * config.train.max_steps)


def test_the_better_rate_is_taken_and_all_seeds_are_there(small):
    for name in ROWS:
        scores = small.scores(name)
        assert set(scores) == {3e-4, 1e-3} and small.rate(name) == min(scores, key=scores.get)
        runs = small.runs(name)
        assert [run.seed for run in runs] == [0, 1]
        assert {run.outcome.cell.config.optimizer.lr for run in runs} == {small.rate(name)}


def test_the_page_has_what_the_runs_measured(small, tmp_path):
    text = page.write([small], tmp_path, "flow_maps").read_text()
    for name in ROWS:
        measured = [
            {r["steps"]: r["mean"] for e in read_evaluations(run.outcome.cell.run_dir) for r in e["results"]
             if e["step"] == run.outcome.cell.config.train.max_steps}
            for run in small.runs(name)
        ]  # fmt: skip
        row = next(line for line in text.splitlines() if line.startswith(f"| {study.ROWS[name].title} |"))
        for steps in study.STEPS:
            a, b = (means[steps] for means in measured)
            assert f"{(a + b) / 2:.3f} ± {abs(a - b) / 2**0.5:.3f}" in row
        assert len(list(small.in_training(name))) == 4
    for kind in ("steps", "training", "samples"):
        assert (tmp_path / f"images/flow_maps/digits_{kind}.png").stat().st_size > 10_000
    assert "| IMM, as published (time_scale 1000) | 4 | 1.50 |" in text


def test_run_again_it_has_nothing_to_do(small, monkeypatch):
    commands = []
    monkeypatch.setattr(common, "run", lambda *words: commands.append(words))
    before = {run.outcome.cell.run_dir: run.means for name in ROWS for run in small.runs(name)}
    again = study.Study(small.data, small.protocol, small.folder, ROWS)
    again.run(1)
    assert {run.outcome.cell.run_dir: run.means for name in ROWS for run in again.runs(name)} == before
    assert [words[:2] for words in commands[:4]] == [("launchers.sweep", "submit"), ("launchers.sweep", "retry")] * 2


def test_unknown_rows_are_named():
    with pytest.raises(UserError, match=r"'meanflows' is unknown; choose from flow_matching, imm"):
        common.chosen("imm,meanflows", study.ROWS)
