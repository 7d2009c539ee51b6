"""The comparison on both axes in small: two methods, one and four blocks, every figure of the page from the runs."""

import dataclasses
from types import SimpleNamespace

import pytest

from experiments.two_axes import claims, page, study
from imm_scale.evaluation.records import read_evaluations
from imm_scale.report.axes.points import Measured, Point, Variant

STEPS = {"imm": (1, 4), "flow_matching": (1, 8)}
BLOCKS = (1, 4)


@pytest.fixture(scope="module")
def small(digits: str, tmp_path_factory: pytest.TempPathFactory) -> study.Study:
    """A study that has been run: two steps of tiny nets, one seed."""
    full = study.DATA["digits"].parts[0]
    settings = {
        **study._lasting(2),
        "model.width": 16,
        "model.depth": 1,
        "model.heads": 2,
        "train.global_batch_size": 16,
        "train.micro_batch_size": 16,
        "evaluation.num": 40,
        "evaluation.repeats": 1,
        "zero.stage": 0,
    }
    part = dataclasses.replace(full, blocks=BLOCKS, seeds=(3,), settings=settings)
    made = study.Study(part, tmp_path_factory.mktemp("two_axes"), {"data.manifest": digits})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "STEPS", STEPS)
        made.run(1)
        assert set(made.outcomes) == {(method, blocks, 3) for method in STEPS for blocks in BLOCKS}
    return made


def test_the_page_has_what_the_runs_measured(small, tmp_path, monkeypatch):
    for module in (study, page, claims, page.figures):
        monkeypatch.setattr(module, "STEPS", STEPS)
    monkeypatch.setattr(claims, "EQUAL", ((4, 8),))
    monkeypatch.setattr(page.figures, "_SAMPLES", 2)
    text = page.write([(study.DataSet("digits", "a few digits", (small.part,)), [small])], [], tmp_path).read_text()
    for (method, blocks, _), outcome in small.outcomes.items():
        results = {r["steps"]: r for e in read_evaluations(outcome.cell.run_dir) for r in e["results"]}
        assert set(results) == set(STEPS[method])
        rows = [line for line in text.splitlines() if line.startswith(f"| {study.TITLES[method]}, J = {blocks} |")]
        for steps, result in results.items():
            assert f"| {result['mean']:.3f} |" in rows[0]
            assert f"| {result['multiply_adds'] / 1e6:.3g}, {blocks * steps} |" in rows[1]
    for picture in ("map", "work", "passes", "samples"):
        assert (tmp_path / f"images/two_axes/digits_{picture}.png").stat().st_size > 5_000


# --- verdicts, of numbers that are made up ---


def _made_up(values):
    """A study of two seeds: {(method, blocks): {steps: (distance at seed 0, at seed 1)}}; work is passes."""

    def variant(method, blocks):
        points = tuple(
            Point(
                setting=f"{steps} steps",
                sequence=blocks,
                refinement=steps,
                passes=blocks * steps,
                work=float(blocks * steps),
                value=sum(of_seeds) / 2,
                excess=None,
                error=None,
                floor=None,
                by_seed={seed: Measured(value, value) for seed, value in enumerate(of_seeds)},
            )
            for steps, of_seeds in values[method, blocks].items()
        )
        return Variant(study.variant(method, blocks), None, "", "training", points)

    def point(method, blocks, steps):
        return next(one for one in variant(method, blocks).points if one.refinement == steps)

    blocks = tuple(dict.fromkeys(blocks for _, blocks in values))
    return SimpleNamespace(part=SimpleNamespace(blocks=blocks, seeds=(0, 1)), variant=variant, point=point)


VALUES = {
    ("imm", 1): {1: (3.0, 3.2), 2: (2.0, 2.1), 4: (1.0, 1.1)},
    ("flow_matching", 1): {1: (9.0, 9.0), 2: (8.0, 8.0), 4: (6.0, 6.0), 8: (4.0, 4.0), 20: (2.0, 2.0), 100: (1.5, 1.6)},
    ("imm", 4): {1: (2.5, 2.6), 2: (1.9, 2.2), 4: (1.2, 1.3)},
}
VALUES["flow_matching", 4] = VALUES["flow_matching", 1]


def test_verdicts_follow_the_numbers():
    made_up = _made_up(VALUES)
    at_2, at_4 = claims.as_good(made_up, 1)
    assert at_2.holds and "Ratios of distances 0.500, 0.525, at 4 times less work and 4 times fewer" in at_2.measured
    assert at_4.holds and "5 times less work" in at_4.measured
    worse = {**VALUES, ("imm", 1): {**VALUES["imm", 1], 2: (2.0, 4.1)}}
    assert [one.holds for one in claims.as_good(_made_up(worse), 1)] == [False, True], "one seed is enough to fail"
    # its best, 1.5 and 1.6, lies half way between 2 and 4 steps in the logarithm: 100 / sqrt(8)
    efficient = claims.efficient(made_up, 1)
    assert efficient.holds and f"By seed: its best 1.500, {100 / 8**0.5:.2f}; its best 1.600" in efficient.measured
    far = {**VALUES, ("imm", 1): {1: (3.0, 3.2), 2: (2.0, 2.1), 4: (1.7, 1.1)}}
    efficient = claims.efficient(_made_up(far), 1)
    assert not efficient.holds and "its best 1.500, not reached" in efficient.measured
    assert claims.along_refinement(made_up, 1).holds
    assert not claims.along_the_sequence(made_up, "imm", 2).holds, "2.1 and 2.2 of the second seed"
    assert claims.along_the_sequence(made_up, "imm", 1).holds
    passes = claims.blocks_cost_passes(made_up)
    # these numbers have work grow as passes do, four times where the formula allows (4 + 1 - 1/4) / 4
    assert not passes.holds and "4 times the passes" in passes.text and "= 1.19 times" in passes.text
