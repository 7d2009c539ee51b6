"""The figures of a sweep's page, each an SVG (or PNG) of its own."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from imm_scale.report.page import COLOURS, axes, svg
from imm_scale.sampling.outputs import image_grid
from imm_scale.sweeps.results import Outcome
from imm_scale.sweeps.study import Study, column

Row = Mapping[str, Any]
_SIZE = (5.4, 3.9)
_DASHES = ("-", "--", ":", "-.")


def colour_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, in their order."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _steps(count: int) -> str:
    return f"{count} step" + ("" if count == 1 else "s")


def _log_axes(figure: Figure, x: str, y: str) -> Any:
    plot = axes(figure, 1, 1, 1)
    plot.set_xscale("log")
    plot.set_yscale("log")
    # matplotlib's own labels run into one another within a decade; upwards there is room for more than sideways
    for axis, labelled in ((plot.xaxis, (1, 2, 5)), (plot.yaxis, (1, 1.5, 2, 3, 5, 7))):
        axis.set_major_locator(LogLocator(subs=labelled))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    plot.set_xlabel(x)
    plot.set_ylabel(y)
    return plot


def training_figure(study: Study, rows: Sequence[Row], steps: int) -> bytes:
    """Distance against training FLOPs, a colour a size, the fitted laws with their bands; held-out cells hollow."""
    figure = Figure(figsize=_SIZE)
    plot = _log_axes(figure, "training FLOPs", study.metric)
    here = [row for row in rows if row["steps"] == steps]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    for size, colour in colour_of(sizes).items():
        own = [row for row in here if row["size"] == size]
        for held_out, face in ((False, colour), (True, "white")):
            points = [row for row in own if row["held_out"] == held_out]
            label = size if not held_out else None
            x, y = column(points, "training_flops"), column(points, "mean")
            plot.plot(x, y, "o", color=colour, markerfacecolor=face, markersize=5, label=label)
        law = study.powers.get((size, steps))
        if law is not None:
            x = np.geomspace(*_ends(column(own, "training_flops")), 60)
            low, high = law.band(x)
            plot.plot(x, law(x), color=colour, linewidth=1)
            plot.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    plot.set_title(f"{_steps(steps)} (hollow: held out)", fontsize=11, loc="left")
    plot.legend(frameon=False, fontsize=9)
    return svg(figure)


def _ends(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max()) * 1.5


def inference_figure(study: Study, rows: Sequence[Row]) -> bytes:
    """Distance against inference FLOPs at the largest budget each size has, a colour a size, a point a step count."""
    figure = Figure(figsize=_SIZE)
    plot = _log_axes(figure, "inference FLOPs per image", study.metric)
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    for size, colour in colour_of(sizes).items():
        own = [row for row in rows if row["size"] == size]
        largest = max(round(row["training_flops"], -9) for row in own)
        points: dict[float, list[float]] = {}
        for row in own:
            if row["training_flops"] >= 0.97 * largest:
                points.setdefault(row["inference_flops"], []).append(row["mean"])
        x = sorted(points)
        plot.plot(x, [np.mean(points[flops]) for flops in x], "o-", color=colour, markersize=5, label=size)
    plot.set_title("largest budget, steps along each line", fontsize=11, loc="left")
    plot.legend(frameon=False, fontsize=9)
    return svg(figure)


def isoflop_figure(study: Study, rows: Sequence[Row], steps: int) -> bytes:
    """Distance against parameters, a colour a budget, the joint law's curve, and the minima found by each method."""
    figure = Figure(figsize=_SIZE)
    plot = _log_axes(figure, "parameters", study.metric)
    here = [row for row in rows if row["steps"] == steps]
    budgets = sorted({row["budget_flops"] for row in here})
    law = study.joints.get(steps)
    for i, C in enumerate(budgets):
        colour = COLOURS[i % len(COLOURS)]
        own = [row for row in here if row["budget_flops"] == C]
        N = column(own, "parameters")
        plot.plot(N, column(own, "mean"), "o", color=colour, markersize=5, label=f"{C:.2g}")
        if law is not None and study.cost is not None:
            x = np.geomspace(N.min(), N.max(), 60)
            plot.plot(x, law(x, study.cost.images(C, x)), color=colour, linewidth=1)
        for marker, optimum in zip("xD", study.optima.get(steps, []), strict=False):
            for minimum in optimum.minima:
                if minimum.budget == C and N.min() <= minimum.size.value <= N.max():
                    plot.plot([minimum.size.value], [minimum.loss], marker, color="#1a1a1a", markersize=6)
    plot.set_title(f"{_steps(steps)}, a colour a budget", fontsize=11, loc="left")
    plot.legend(frameon=False, fontsize=9)
    return svg(figure)


def steps_figure(metric: str, rows: Sequence[Row], label: str) -> bytes:
    """Distance against sampling steps, a line a value of one factor: for sweeps without sizes."""
    figure = Figure(figsize=_SIZE)
    plot = _log_axes(figure, "sampling steps", metric)
    names = list(dict.fromkeys(row[label] for row in rows))
    for i, name in enumerate(names):
        points: dict[int, list[float]] = {}
        for row in rows:
            if row[label] == name:
                points.setdefault(row["steps"], []).append(row["mean"])
        x = sorted(points)
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": _DASHES[i // len(COLOURS) % len(_DASHES)]}
        plot.plot(x, [np.mean(points[steps]) for steps in x], marker="o", markersize=5, label=str(name), **style)
    ticks = sorted({row["steps"] for row in rows})
    plot.set_xticks(ticks, [str(tick) for tick in ticks])
    plot.legend(frameon=False, fontsize=9)
    return svg(figure)


def curve_figure(outcomes: Sequence[Outcome], key: str, labels: Mapping[str, str]) -> bytes:
    """A quantity of metrics.jsonl against images, a line a cell, running means of 5 % of the run."""
    figure = Figure(figsize=_SIZE)
    plot = _log_axes(figure, "images", key.replace("_", " "))
    names = list(dict.fromkeys(labels.values()))
    colours, shown = colour_of(names), set()
    for one in outcomes:
        values = np.array([record[key] for record in one.records], float)
        if not len(values):
            continue
        label = labels[one.cell.name]
        width = max(1, len(values) // 20)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        images = [record["images_seen"] for record in one.records][width - 1 :]
        plot.plot(images, smooth, color=colours[label], linewidth=1, label=None if label in shown else label)
        shown.add(label)
    if shown:
        plot.legend(frameon=False, fontsize=9)
    return svg(figure)


def sample_matrix(pictures: Mapping[str, Mapping[int, np.ndarray]], rows: int = 3, columns: int = 10) -> bytes:
    """A PNG: a row a cell, a column a step count, in each place the first samples (as the paper's Figure 8 has one).

    Args:
        pictures: {row's name: {steps: images (N, H, W, C) uint8}}; with ten classes a column of samples is a class.
    """
    steps = sorted({count for row in pictures.values() for count in row})
    figure = Figure(figsize=(2.8 * len(steps) + 0.6, 0.95 * len(pictures) + 0.5), layout="constrained")
    grid = figure.subplots(len(pictures), len(steps), squeeze=False)
    for row, (name, by_steps) in enumerate(pictures.items()):
        for place, count in zip(grid[row], steps, strict=True):
            place.set_xticks([])
            place.set_yticks([])
            place.spines[:].set_visible(False)
            if count in by_steps:
                place.imshow(_first(by_steps[count], rows, columns), cmap="gray", interpolation="nearest")
            if row == 0:
                place.set_title(_steps(count), fontsize=11)
        grid[row][0].set_ylabel(name.replace(", ", "\n"), fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def _first(images: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The first samples as one picture, read like text."""
    columns = min(columns, len(images))
    rows = min(rows, len(images) // columns)
    # image_grid goes down each column first.
    order = [row * columns + column for column in range(columns) for row in range(rows)]
    return np.asarray(image_grid(images[order], range(rows)))
