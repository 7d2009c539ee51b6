"""What was expected of both axes, and whether the runs agree: every verdict is computed from their numbers."""

import itertools
import statistics
from collections.abc import Iterator

from experiments.claims import Claim
from experiments.two_axes.study import STEPS, Study
from imm_scale.report.axes.efficiency import Efficiency, efficiency
from imm_scale.report.axes.findings import curve
from imm_scale.report.axes.points import Point

# IMM in so many steps a block, and flow matching in how many it should be as good as (two_axes, section 10).
EQUAL = ((2, 8), (4, 20))
LEAST_EFFICIENCY = 3.0


def as_good(study: Study, blocks: int) -> Iterator[Claim]:
    """IMM in few steps a block against flow matching in many, seed by seed, and what each counted."""
    for few, many in EQUAL:
        ours, theirs = study.point("imm", blocks, few), study.point("flow_matching", blocks, many)
        ratios = [a / b for a, b in zip(_values(ours), _values(theirs), strict=True)]
        yield Claim(
            f"J = {blocks}: IMM in {few} steps a block is at most as far as flow matching in {many}, from every seed.",
            max(ratios) <= 1.0,
            f"Ratios of distances {_listed(ratios)}, at {_times(theirs.work, ours.work)} times less work and "
            f"{theirs.passes / ours.passes:.3g} times fewer passes.",
        )


def efficient(study: Study, blocks: int) -> Claim:
    """The work that flow matching needs for its best over what IMM needs for the same, of each seed."""
    base, ours = study.variant("flow_matching", blocks), study.variant("imm", blocks)
    seeds: list[int | None] = [*study.part.seeds] if len(study.part.seeds) > 1 else [None]
    found = [efficiency(curve(base, "work", seed), curve(ours, "work", seed)) for seed in seeds]
    said = "; ".join(f"its best {one.target:.3f}, {_ratio(one)}" for one in found)
    return Claim(
        f"J = {blocks}: for flow matching's best distance IMM needs {LEAST_EFFICIENCY:g} times less work, from every "
        "seed.",
        all(one.ratio is not None and one.ratio >= LEAST_EFFICIENCY for one in found),
        f"By seed: {said}.",
    )


def _ratio(one: Efficiency) -> str:
    return "not reached" if one.ratio is None else f"{'at least ' * one.is_bound}{one.ratio:.2f}"


def along_refinement(study: Study, blocks: int) -> Claim:
    """More steps in each block are better, of IMM from every seed."""
    values = _by_seed([study.point("imm", blocks, steps) for steps in STEPS["imm"]])
    return Claim(
        f"J = {blocks}: IMM gains by refinement: each step count is better than the one before, from every seed.",
        all(a > b for of_seed in values for a, b in itertools.pairwise(of_seed)),
        f"Means in {', '.join(map(str, STEPS['imm']))} steps: {_means(values)}.",
    )


def along_the_sequence(study: Study, method: str, steps: int) -> Claim:
    """More blocks are better at equal steps in each."""
    blocks = study.part.blocks
    values = _by_seed([study.point(method, count, steps) for count in blocks])
    return Claim(
        f"{'IMM' if method == 'imm' else 'Flow matching'} in {steps} step{'s' * (steps > 1)} a block gains by the "
        "sequence: more blocks are better, from every seed.",
        all(a > b for of_seed in values for a, b in itertools.pairwise(of_seed)),
        f"Means for J = {', '.join(map(str, blocks))}: {_means(values)}.",
    )


def blocks_cost_passes(study: Study) -> Claim:
    """Blocks multiply the passes and hardly the work."""
    blocks, steps = study.part.blocks, STEPS["imm"][-1]
    found = [study.point("imm", count, steps) for count in blocks]
    assert found[0].work is not None and found[-1].work is not None, "new evaluations state their work"
    work, passes = found[-1].work / found[0].work, found[-1].passes / found[0].passes
    formula = (steps + 1 - 1 / blocks[-1]) / steps
    return Claim(
        f"Blocks cost passes, not work: J = {blocks[-1]} takes {passes:g} times the passes of J = {blocks[0]} and at "
        f"most (L + 1 - 1/J) / L = {formula:.3g} times the work, at L = {steps}.",
        work <= 1.02 * formula,  # small nets have a larger share of embedders and final layers, which are not shared
        f"Counted: {work:.3g} times the work.",
    )


def _by_seed(found: list[Point]) -> list[list[float]]:
    """A row a seed, a column a point."""
    return [list(row) for row in zip(*(_values(point) for point in found), strict=True)]


def _values(point: Point) -> list[float]:
    """Of each training seed; of a single one its value."""
    return [point.by_seed[seed].value for seed in sorted(point.by_seed)] or [point.value]


def _means(values: list[list[float]]) -> str:
    return _listed([statistics.fmean(column) for column in zip(*values, strict=True)])


def _times(more: float | None, less: float | None) -> str:
    assert more is not None and less is not None, "new evaluations state their work"
    return f"{more / less:.3g}"


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
