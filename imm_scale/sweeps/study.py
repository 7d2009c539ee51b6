"""What a sweep's table says: laws per size and step count, the joint law, optimal sizes, predictions, and the cheapest
way to a wanted quality. The measure is the evaluated distance: IMM's loss has a moving target and compares no two runs.

Rows are those of `results.rows`. Compute comes on two axes: training FLOPs (4 forward passes per image for IMM) and
inference FLOPs (forward pass times steps, twice that with guidance).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from imm_scale.errors import UserError
from imm_scale.sweeps import isoflop, scaling_law
from imm_scale.sweeps.isoflop import Cost, Optimum
from imm_scale.sweeps.scaling_law import Interval, Law

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """A held-out cell: what the law said and what was measured."""

    cell: str
    steps: int
    predicted: Interval
    measured: float

    @property
    def inside(self) -> bool:
        """Whether the prediction's interval covers what was measured."""
        return self.predicted.covers(self.measured)


@dataclass(frozen=True)
class Forecast:
    """The next budget: the size the law would take, and the distance it expects there."""

    steps: int
    training_flops: float
    parameters: Interval
    images: float
    distance: Interval


@dataclass(frozen=True)
class Choice:
    """The cheapest size and step count that reached a distance."""

    target: float
    size: str
    steps: int
    distance: float
    inference_flops: float
    training_flops: float


@dataclass
class Study:
    """Everything the report shows about a sweep with sizes and budgets.

    Attributes:
        metric: the distance all rows share.
        steps: step counts, in order.
        powers: {(size, steps): law in training FLOPs}.
        joints: {steps: law in parameters and images}.
        optima: {steps: by parabola, by variable projection}.
        checks: the held-out cells.
        forecasts: one per step count.
        choices: from the worst wanted distance to the best.
        notes: fits that could not be made, and what the data cannot tell.
    """

    metric: str
    steps: list[int]
    powers: dict[tuple[str, int], Law] = field(default_factory=dict)
    joints: dict[int, Law] = field(default_factory=dict)
    optima: dict[int, list[Optimum]] = field(default_factory=dict)
    cost: Cost | None = None
    checks: list[Check] = field(default_factory=list)
    forecasts: list[Forecast] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def measured(rows: Sequence[Row], metric: str | None = None) -> list[Row]:
    """The rows with a positive finite distance of one metric (the first met), plain sampling of the first average."""
    with_metric = [row for row in rows if row["metric"] is not None]
    metric = metric or (with_metric[0]["metric"] if with_metric else None)
    return [row for row in with_metric if row["metric"] == metric and np.isfinite(row["mean"]) and row["mean"] > 0]


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """One column of n result rows, (n,) fp64."""
    return np.array([row[name] for row in rows], float)


def analyse(rows: Sequence[Row]) -> Study:
    """All fits the rows can carry; what they cannot is said in the notes.

    Raises:
        UserError: no cell has a result.
    """
    usable = measured(rows)
    if not usable:
        raise UserError("no cell of the sweep has a result: `imm-scale sweep status` says how far it is")
    study = Study(usable[0]["metric"], sorted({row["steps"] for row in usable}))
    study.notes.extend(_unlike(usable))
    if "size" not in usable[0]:
        study.notes.append("the sweep has no sizes: no law is fitted")
        return study
    fitted = [row for row in usable if not row["held_out"]]
    _try(study, "FLOPs by parameters", lambda: _add_cost(study, usable))
    for steps in study.steps:
        here = [row for row in fitted if row["steps"] == steps]
        _add_powers(study, steps, here)
        _add_joint(study, steps, here)
        _add_optima(study, steps, here)
        _add_checks(study, steps, [row for row in usable if row["steps"] == steps and row["held_out"]])
        _add_forecast(study, steps, usable)
    study.choices = cheapest(usable)
    return study


_ALIKE = ("num", "repeats", "guidance_scale", "labels", "feature_network", "reference", "precision", "compile")


def _unlike(rows: Sequence[Row]) -> list[str]:
    """What cells were not measured alike in, where the sweep itself varies it: distances then have no common scale."""
    seen = {key: dict.fromkeys(row.get(key) for row in rows) for key in _ALIKE}
    return [
        f"cells were measured with different {key.replace('_', ' ')} ({', '.join(map(str, values))}): "
        "only those that share it can be compared"
        for key, values in seen.items()
        if len(values) > 1
    ]


def measured_under(rows: Sequence[Row]) -> str:
    """Metric, samples, guidance and reference of the rows in words, every value there is."""

    def values(text: Callable[[Row], str]) -> str:
        return " or ".join(dict.fromkeys(map(text, rows)))

    samples = values(lambda row: f"{row['repeats']} x {row['num']}")
    guidance = values(lambda row: f"{row['guidance_scale']:g}")
    reference = values(lambda row: row.get("reference") or "not recorded")
    return f"{rows[0]['metric']} of {samples} samples, guidance {guidance}, reference {reference}"


def _try(study: Study, what: str, action: Callable[[], None]) -> None:
    """A fit the data may not carry: then a note says why."""
    try:
        action()
    except UserError as error:
        study.notes.append(f"{what}: {error}")


def _add_cost(study: Study, rows: Sequence[Row]) -> None:
    study.cost = isoflop.cost_of(column(rows, "parameters"), column(rows, "training_flops") / column(rows, "images"))


def _add_powers(study: Study, steps: int, rows: Sequence[Row]) -> None:
    for size in dict.fromkeys(row["size"] for row in rows):
        own = [row for row in rows if row["size"] == size]

        def add(size: str = size, own: Sequence[Row] = own) -> None:
            law = scaling_law.power_law(column(own, "training_flops"), column(own, "mean"))
            study.powers[size, steps] = law
            study.notes.extend(f"power law, {size}, {steps} steps: {doubt}" for doubt in law.warnings)

        _try(study, f"power law, {size}, {steps} steps", add)


def _add_joint(study: Study, steps: int, rows: Sequence[Row]) -> None:
    def add() -> None:
        law = scaling_law.joint_law(column(rows, "parameters"), column(rows, "images"), column(rows, "mean"))
        study.joints[steps] = law
        study.notes.extend(f"joint law, {steps} steps: {doubt}" for doubt in law.warnings)

    _try(study, f"joint law, {steps} steps", add)


def _add_optima(study: Study, steps: int, rows: Sequence[Row]) -> None:
    budgets = _budgets(rows)
    if budgets is None or study.cost is None:
        return
    N, loss, cost = column(rows, "parameters"), column(rows, "mean"), study.cost
    study.optima[steps] = []

    def add(make: Callable[[], Optimum]) -> None:
        optimum = make()
        study.optima[steps].append(optimum)
        study.notes.extend(f"{steps} steps, {warning}" for warning in optimum.warnings)

    _try(study, f"{steps} steps", lambda: add(lambda: isoflop.parabola(budgets, N, loss)))
    images = column(rows, "images")
    _try(study, f"{steps} steps", lambda: add(lambda: isoflop.variable_projection(budgets, N, images, loss, cost)))


def _budgets(rows: Sequence[Row]) -> np.ndarray | None:
    """The nominal budgets in FLOPs, None for a sweep without them."""
    return column(rows, "budget_flops") if rows and rows[0].get("budget_flops") is not None else None


def _add_checks(study: Study, steps: int, held_out: Sequence[Row]) -> None:
    law = study.joints.get(steps)
    for row in held_out if law else ():
        assert law is not None
        predicted = law.predict(row["parameters"], row["images"])
        study.checks.append(Check(row["cell"], steps, predicted, row["mean"]))


def _add_forecast(study: Study, steps: int, rows: Sequence[Row]) -> None:
    """At the budget one step beyond the largest measured, by the joint law."""
    law, budgets = study.joints.get(steps), _budgets(rows)
    if law is None or budgets is None or study.cost is None or len(np.unique(budgets)) < 2:
        return
    known, cost = np.unique(budgets), study.cost
    C = float(known[-1] * (known[-1] / known[0]) ** (1 / (len(known) - 1)))

    def sizes(constants: Mapping[str, np.ndarray]) -> np.ndarray:
        A, alpha, B, beta = (constants[name] for name in ("A_N", "exponent_N", "A_D", "exponent_D"))
        return isoflop.optimal_size(A, alpha, B, beta, cost, C)

    best = float(sizes(law.constants())[0])
    if not np.isfinite(best):
        study.notes.append(f"{steps} steps: the joint law has no best size at C = {C:.3g}")
        return
    others = sizes(law.constants(law.samples_SP))
    others = others[np.isfinite(others)]
    images = float(cost.images(C, best))
    study.forecasts.append(Forecast(steps, C, scaling_law.interval_of(best, others), images, law.predict(best, images)))


def cheapest(rows: Sequence[Row], levels: int = 6) -> list[Choice]:
    """For distances from the median reached down to the best: the fewest inference FLOPs that reached each.

    Where two cost the same, the one with less training. Distances are means over seeds.
    """
    points: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        key = (row["inference_flops"], row["training_flops"], row["size"], row["steps"])
        points.setdefault(key, []).append(row["mean"])
    reached = sorted((*key, float(np.mean(values))) for key, values in points.items())
    distances = [point[-1] for point in reached]
    choices: list[Choice] = []
    for target in np.geomspace(np.median(distances), min(distances), levels):
        inference, training, size, steps, distance = next(p for p in reached if p[-1] <= target * (1 + 1e-12))
        choices.append(Choice(float(target), size, steps, distance, inference, training))
    return choices
