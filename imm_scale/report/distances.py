"""What runs were measured at: distances as text, as a table of the page, and against their cost in a figure."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from matplotlib.figure import Figure

from imm_scale.evaluation import cost_quality
from imm_scale.evaluation.records import Conditions, error_of, samples, with_error
from imm_scale.report.page import COLOURS, axes, image, svg, table

_WIDEST_GRID = 24  # characters


class Measured(Protocol):
    """A run's name, the evaluations of one of its checkpoints, and their results, each with its `conditions`."""

    @property
    def name(self) -> str:
        """What lines and rows are called."""

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """As `evaluation.records` reads them."""

    @property
    def distances(self) -> list[dict[str, Any]]:
        """All their results."""


def section(runs: Sequence[Measured]) -> str:
    """HTML of figure and table; one run at least has a result."""
    return f"{_figure(runs)}{_caption(runs)}{_table(runs)}"


def lines(runs: Sequence[Measured]) -> list[str]:
    """The table as plain text, its head first."""
    head = ("steps", "evaluations", "distance", "samples", "guidance", "precision", "grid", "reference", "metric")
    every = [(run.name, _cells(d) | {"grid": _short(d["grid"])}) for run in runs for d in run.distances]
    rows = [("run", *head)] + [(name, *(cells[key] for key in head)) for name, cells in every]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:-1], widths[1:]), row[-1]]) for row in rows]


def _short(grid: str | None) -> str:
    """A grid as a column of text shows it: of many step sizes the first."""
    text = grid or "not recorded"
    return text if len(text) <= _WIDEST_GRID else text[:_WIDEST_GRID].rpartition(",")[0] + ",.."


def _cells(d: Mapping[str, Any]) -> dict[str, str]:
    """What tables show of a result, by column."""
    under = {name: value or "not recorded" for name, value in d["conditions"].items()}
    return {
        "steps": str(d["steps"]),
        "evaluations": str(d["function_evaluations"]),
        "distance": with_error(d["mean"], error_of(d)),
        "samples": samples(d),
        "guidance": under["guidance"],
        "precision": under["precision"],
        "reference": under["reference"],
        "metric": under["metric"],
    }


def _table(runs: Sequence[Measured]) -> str:
    rows = [[run.name, *(_cells(d) | {"grid": d["grid"]}).values()] for run in runs for d in run.distances]
    head = ["run", *(_cells(next(d for run in runs for d in run.distances)) | {"grid": ""}).keys()]
    note = "+- is the standard deviation over seeds; of one seed, a jackknife over its samples."
    return table(head, rows) + f"<p>{note}</p>"


# --- the figure ---


def _without_precision(setting: Conditions) -> Conditions:
    return {name: value for name, value in setting.items() if name != "precision"}


def _drawn(runs: Sequence[Measured]) -> list[tuple[Measured, Conditions]]:
    """The lines of the figure: what most results were measured under, in each precision."""
    every = [e for run in runs for e in run.evaluations]
    settings = cost_quality.settings(every)
    alike = [_without_precision(cost_quality.setting(e, result)) for e in every for result in e["results"]]
    shown = max(map(_without_precision, settings), key=alike.count)
    return [(run, one) for run in runs for one in settings if _without_precision(one) == shown]


def _figure(runs: Sequence[Measured]) -> str:
    """Distance against function evaluations of all runs, with its error bars, a line for each precision.

    All of it was measured under the same conditions, those that most results share; at each cost, the best guidance.
    """
    figure = Figure(figsize=(8, 4.5))
    plot = axes(figure, 1, 1, 1)
    drawn = _drawn(runs)
    metric = _metric(runs, drawn[0][1])
    ticks: set[int] = set()
    for colour, (run, setting) in zip(COLOURS * len(drawn), drawn, strict=False):
        points = cost_quality.curves(run.evaluations, setting).get(metric, [])
        ticks |= {point.function_evaluations for point in points}
        if points:
            plot.errorbar(
                [point.function_evaluations for point in points],
                [point.value for point in points],
                yerr=[point.error or 0.0 for point in points],
                marker="o",
                capsize=3,
                color=colour,
                label=_label(run, setting, points),
            )
    _scale(plot, sorted(ticks))
    plot.set_ylabel(f"distance to the reference ({metric})")
    plot.legend(frameon=False)
    return image("image/svg+xml", svg(figure))


def _metric(runs: Sequence[Measured], setting: Conditions) -> str:
    """Of the results under these conditions: each feature network has its own."""
    every = [(e, result) for run in runs for e in run.evaluations for result in e["results"]]
    return next(str(result["metric"]) for e, result in every if cost_quality.setting(e, result) == setting)


def _label(run: Measured, setting: Conditions, points: Sequence[cost_quality.Point]) -> str:
    scales = sorted({point.guidance_scale for point in points})
    guidance = [] if scales == [1.0] else ["guidance " + ", ".join(f"{scale:g}" for scale in scales)]
    precision = [] if setting["precision"] == "fp32" else [str(setting["precision"])]
    return ", ".join([run.name, *guidance, *precision])


def _scale(plot: Any, ticks: Sequence[int]) -> None:
    plot.set_xscale("log")
    plot.set_yscale("log")
    plot.set_xticks(ticks, [str(tick) for tick in ticks])
    plot.minorticks_off()
    plot.set_xlabel("function evaluations per image")


def _caption(runs: Sequence[Measured]) -> str:
    """What everything in the figure shares, and how much was measured otherwise."""
    drawn = _drawn(runs)
    shown = _without_precision(drawn[0][1])
    under = ", ".join(f"{name} {value or 'not recorded'}" for name, value in shown.items())
    every = [cost_quality.setting(e, result) for run in runs for e in run.evaluations for result in e["results"]]
    others = sum(_without_precision(one) != shown for one in every)
    left_out = f" {others} results that were measured otherwise stand in the table alone." if others else ""
    return f"<p>{html.escape(under)}; at each cost the best guidance that was measured.{left_out}</p>"
