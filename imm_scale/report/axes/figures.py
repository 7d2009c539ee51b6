"""The three figures of a column: the map of both axes, quality against work, and quality against passes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from imm_scale.report.axes.efficiency import At, between
from imm_scale.report.axes.findings import Cost, cost, curve
from imm_scale.report.axes.points import Column, Point, Variant
from imm_scale.report.page import COLOURS, axes, svg

_SIZE = (5.6, 4.2)
_LARGEST = 700.0  # area of the disk of most work, in square points
_FLOOR = "floor of independent tokens"
_GREY = "#555555"
_LABELS = {"work": "multiply-adds a sample", "passes": "passes, one after another"}


class Family(NamedTuple):
    """Where published models of a kind lie: ranges of passes along the sequence and of refinement."""

    name: str
    sequence: tuple[float, float]
    refinement: tuple[float, float]


def families(modality: str, length: int | None) -> list[Family]:
    """What is outlined, with the passes that their authors use; T is the length of our own sequences."""
    if modality == "images":
        return [
            Family("DiT", (1, 1), (100, 100)),
            Family("MAR", (64, 64), (100, 100)),
            Family("BAGEL, an image", (1, 1), (50, 50)),
            Family("IMM", (1, 1), (1, 8)),
            Family("block IMM", (2, 16), (1, 4)),
        ]
    t = float(length or 64)
    return [
        Family("autoregressive", (t, t), (1, 1)),
        Family("masked", (1, 1), (1, t)),
        Family("block diffusion", (2, t / 2), (2, t / 2)),
        Family("multi-token", (t / 8, t / 2), (1, 1)),
    ]


def letters(column: Column) -> dict[str, str]:
    """{variant: its letter}, by which disks are told apart."""
    return {one.name: chr(ord("A") + i) if i < 26 else str(i) for i, one in enumerate(column.variants)}


def _styled(column: Column) -> list[tuple[Variant, str, str]]:
    """Each variant with its letter and colour."""
    by_name = letters(column)
    return [(one, by_name[one.name], COLOURS[i % len(COLOURS)]) for i, one in enumerate(column.variants)]


# --- the map ---


def axes_map(column: Column) -> Figure:
    """Disks of equal place stand beside each other; a disk needs its work."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    plot = axes(figure, 1, 1, 1)
    for family in families(column.modality, column.length):
        _outline(plot, family)
    drawn = [(point, letter, colour) for one, letter, colour in _styled(column) for point in one.points if point.work]
    if drawn:
        _disks(figure, plot, column, drawn)
    _scales(plot, column)
    plot.set_xlabel("sequence passes")
    plot.set_ylabel("refinement passes")
    return figure


def _outline(plot: Any, family: Family) -> None:
    (left, right), (low, high) = ((a / 1.22, b * 1.22) for a, b in (family.sequence, family.refinement))
    frame = Rectangle((left, low), right - left, high - low, fill=False, edgecolor=_GREY, linestyle=(0, (4, 2)))
    plot.add_patch(frame)
    plot.annotate(family.name, (left, high), (2, 2), textcoords="offset points", fontsize=9, color=_GREY)


def _disks(figure: Figure, plot: Any, column: Column, drawn: Sequence[tuple[Point, str, str]]) -> None:
    most = max(point.work or 0.0 for point, _, _ in drawn)
    norm = _norm([point.value for point, _, _ in drawn])
    taken: dict[tuple[float, float], int] = {}
    for point, letter, colour in sorted(drawn, key=lambda one: -(one[0].work or 0.0)):
        place = point.sequence, point.refinement
        x = point.sequence * 1.17 ** taken.get(place, 0)
        taken[place] = taken.get(place, 0) + 1
        area = _LARGEST * (point.work or 0.0) / most
        shown = plot.scatter(
            [x],
            [point.refinement],
            s=area,
            c=[point.value],
            norm=norm,
            cmap="viridis_r",
            edgecolors=colour,
            linewidths=1.2,
            zorder=3,
        )
        offset = math.sqrt(area) / 2 * 0.7 + 1
        plot.annotate(
            letter, (x, point.refinement), (offset, offset), textcoords="offset points", fontsize=8, color=colour
        )
    bar = figure.colorbar(shown, ax=plot, shrink=0.8)
    bar.set_label(f"{column.metric} (less is better)", fontsize=9)


def _norm(values: Sequence[float]) -> Normalize:
    """Logarithmic where values span more than three to one."""
    low, high = min(values), max(values)
    if low > 0 and high > 3 * low:
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + 1e-9)


def _scales(plot: Any, column: Column) -> None:
    everything = families(column.modality, column.length)
    points = [point for one in column.variants for point in one.points]
    for axis, most in (
        ("x", max([f.sequence[1] for f in everything] + [p.sequence for p in points])),
        ("y", max([f.refinement[1] for f in everything] + [p.refinement for p in points])),
    ):
        getattr(plot, f"set_{axis}scale")("log", base=2)
        getattr(plot, f"set_{axis}lim")(0.7, most * 2.2)
        _powers(plot, axis, most)


def _powers(plot: Any, axis: str, most: float) -> None:
    ticks = [2**i for i in range(math.ceil(math.log2(max(most, 1.0))) + 1)]
    getattr(plot, f"set_{axis}ticks")(ticks, [str(tick) for tick in ticks])
    plot.minorticks_off()


# --- quality against cost ---


def quality(column: Column, kind: Cost) -> Figure:
    """Points with their errors, the lower envelope of each variant, and floors of independent tokens dotted."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    plot = axes(figure, 1, 1, 1)
    for one, letter, colour in _styled(column):
        points = [point for point in one.points if cost(point, kind) is not None]
        if points:
            _errors(plot, points, kind, colour, f"{letter} {one.name}")
            lower = between(curve(one, kind))
            plot.plot([at.cost for at in lower], [at.value for at in lower], color=colour, linewidth=1.4)
            _floor(plot, points, kind, colour)
    plot.set_xscale("log")
    if column.modality == "images" and all(point.value > 0 for one in column.variants for point in one.points):
        plot.set_yscale("log")
    if kind == "passes":
        plot.set_xscale("log", base=2)
        _powers(plot, "x", max(point.passes for one in column.variants for point in one.points))
    plot.set_xlabel(_LABELS[kind])
    plot.set_ylabel(f"{column.metric} (less is better)")
    handles, labels = plot.get_legend_handles_labels()
    once = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0] == _FLOOR))
    plot.legend(once.values(), once.keys(), frameon=False, fontsize=9)
    return figure


def _errors(plot: Any, points: Sequence[Point], kind: Cost, colour: str, label: str) -> None:
    x, y = [cost(point, kind) for point in points], [point.value for point in points]
    bars = [point.error or 0.0 for point in points]
    plot.errorbar(x, y, yerr=bars, fmt="o", markersize=4.5, capsize=2.5, linewidth=1, color=colour, label=label)


def _floor(plot: Any, points: Sequence[Point], kind: Cost, colour: str) -> None:
    floors = [At(float(cost(p, kind) or 0.0), p.floor) for p in points if p.floor is not None]
    lower = sorted(dict(sorted(floors, reverse=True)).items())  # one a cost, the least
    if lower:
        style = {"linestyle": ":", "marker": ".", "markersize": 3, "color": colour, "linewidth": 1.4}
        plot.plot([x for x, _ in lower], [y for _, y in lower], label=_FLOOR, **style)


def draw(column: Column) -> dict[str, bytes]:
    """{caption: SVG} of the three figures."""
    by_metric = f"{column.metric} against"
    return {
        "map of sequence and refinement passes": svg(axes_map(column)),
        f"{by_metric} work": svg(quality(column, "work")),
        f"{by_metric} passes": svg(quality(column, "passes")),
    }
