"""The search for the best guidance: on functions of known minimum, with noise of known size, by the command."""

import json
import math
import shutil
from statistics import fmean

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from imm_scale.errors import UserError
from imm_scale.evaluation.guidance_search import minimize, parse
from tests import ranks


def _curve(minimum: float, noise: float = 0.0, shared: float = 0.0, seeds: int = 5):
    """(w - minimum)^2-like values; each seed has an offset of its own, shared by all w, and noise at each w."""
    generator = np.random.default_rng(0)
    offsets = shared * generator.normal(size=seeds)
    calls: list[float] = []

    def measure(w: float) -> tuple[float, ...]:
        calls.append(w)
        own = noise * np.random.default_rng(round(w * 1000)).normal(size=seeds)
        return tuple(2.0 + math.log(w / minimum) ** 2 + offsets + own)

    return measure, calls


@pytest.mark.parametrize("minimum", [1.1, 1.3, 1.9, 2.5, 2.9])
def test_finds_a_known_minimum_in_few_evaluations(minimum):
    measure, calls = _curve(minimum)
    best = minimize(4, measure, 1.0, 3.0, tolerance=0.05, most=10)
    assert best.guidance == pytest.approx(minimum, abs=0.05)
    assert len(calls) == len(best.points) <= 10
    assert not best.at_end


def test_takes_fewer_evaluations_than_a_library_that_cannot_be_told_the_ends():
    """scipy's bounded Brent search with the same tolerance; the ends are measured for it, since it never does."""
    ours, theirs = 0, 0
    for minimum in (0.8, 1.1, 1.3, 1.9, 2.5, 2.9, 4.0):
        (measure, mine), (other, yours) = _curve(minimum), _curve(minimum)
        minimize(4, measure, 1.0, 3.0, tolerance=0.05, most=10)
        other(1.0), other(3.0)
        options = {"xatol": 0.05, "maxiter": 8}
        minimize_scalar(lambda w, f=other: fmean(f(w)), bounds=(1.0, 3.0), method="bounded", options=options)
        ours, theirs = ours + len(mine), theirs + len(yours)
    assert ours < theirs


@pytest.mark.parametrize(("minimum", "end"), [(0.8, 1.0), (4.0, 3.0)])
def test_an_end_of_the_range_is_said_to_be_one(minimum, end):
    best = minimize(1, _curve(minimum)[0], 1.0, 3.0, tolerance=0.05, most=10)
    assert best.guidance == end
    assert best.at_end
    assert "widen it" in best.describe()


def test_what_seeds_share_does_not_blur_the_answer():
    # Offsets of 1 between seeds, a hundred times the differences that matter, and noise of 0.001.
    best = minimize(2, _curve(1.7, noise=1e-3, shared=1.0)[0], 1.0, 3.0, tolerance=0.05, most=10)
    assert best.guidance == pytest.approx(1.7, abs=0.1)
    low, high = best.not_worse
    # Two errors of a mean of 5 differences are about 0.0013: within 0.06 of the minimum in w, twice that for chance.
    assert 1.55 < low <= best.guidance <= high < 1.85


def test_noise_widens_what_cannot_be_told_apart():
    quiet, loud = (minimize(2, _curve(1.7, noise)[0], 1.0, 3.0, 0.05, 10) for noise in (1e-4, 0.3))
    assert loud.not_worse[1] - loud.not_worse[0] > quiet.not_worse[1] - quiet.not_worse[0]
    single = minimize(2, _curve(1.7, seeds=1)[0], 1.0, 3.0, 0.05, 10)
    assert single.not_worse == (1.0, 3.0), "one seed tells nothing apart"


def test_arguments():
    search_range = parse(["guidance=1.0:3.0", "steps=1,2"], (4,))
    assert (search_range.low, search_range.high, search_range.steps) == (1.0, 3.0, (1, 2))
    assert parse(["guidance=1:2"], (4, 8)).steps == (4, 8)
    for args in (["guidance=3:1"], ["guidance=1"], ["steps=2"], ["guidance=1:2", "seed=3"], ["guidance=a:b"]):
        with pytest.raises(UserError, match="guidance"):
            parse(args, (1,))


def test_the_command_writes_what_it_found(trained, tmp_path):
    run_dir = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    argv = ["evaluate", str(run_dir), "--search", "guidance=1.0:2.0", "steps=1", "--num", "64", "--repeats", "2"]
    code, output = ranks.run(ranks.command_and_output, 2, *argv)[0]
    assert code == 0, output
    assert "best guidance" in output
    (file,) = (run_dir / "searches").glob("step-00000002-*.json")
    (best,) = json.loads(file.read_text())["best"]
    points = {point["guidance"]: sum(point["values"]) / 2 for point in best["points"]}
    assert min(points, key=points.get) == best["guidance"]
    # Every point is an evaluation of its own, and a second search meets them all.
    count = len(list((run_dir / "evaluations").iterdir()))
    assert ranks.run(ranks.command, 1, *argv) == [0]
    assert len(list((run_dir / "evaluations").iterdir())) == count
