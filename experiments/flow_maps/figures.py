"""The pictures of the page: distances against steps, against training, and samples from one noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from experiments import common
from experiments.flow_maps.study import ROWS, STEPS, Study

_COLOURS = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#8C564B", "#7F7F7F", "#BCBD22"),
)
_MARKERS = "osD^v<>P*X"
_SAMPLES = 8  # of a row and step count


def groups(rows: Sequence[str]) -> dict[str, list[str]]:
    """{title of a panel: its rows}."""
    found: dict[str, list[str]] = {}
    for name in rows:
        found.setdefault(ROWS[name].group, []).append(name)
    return found


def _panels(study: Study, height: float) -> tuple[Figure, list[tuple[Any, str, list[str]]]]:
    """A figure with a plot for each group, beside its title and its rows; distances on one axis."""
    by_group = groups(study.rows)
    figure = Figure(figsize=(5.2 * len(by_group), height), layout="constrained")
    plots = figure.subplots(1, len(by_group), sharey=True, squeeze=False)[0]
    return figure, [(plot, title, names) for plot, (title, names) in zip(plots, by_group.items(), strict=True)]


def against_steps(study: Study, out: Path) -> None:
    """Mean distances over seeds with their standard deviation; the upper axis is the cost of a sample."""
    figure, panels = _panels(study, height=4.8)
    for plot, title, names in panels:
        for name, style in zip(names, _styles(), strict=False):
            found = study.distances(name)
            steps = sorted(found)
            means, spread = ([found[n][i] for n in steps] for i in (0, 1))
            plot.errorbar(steps, means, yerr=spread, capsize=2, label=ROWS[name].title, **style)
        plot.set(xscale="log", yscale="log", xlabel="steps", title=title)
        plot.set_xticks([1, 2, 4, 8, 16, 50], ["1", "2", "4", "8", "16", "50"], minor=False)
        plot.minorticks_off()
        plot.legend(frameon=False, fontsize=8)
        per_step = study.forward_flops(names[0]) / 1e6
        upper = plot.secondary_xaxis("top", functions=(lambda x, f=per_step: x * f, lambda x, f=per_step: x / f))
        upper.set_xlabel("multiply-adds a sample, millions", fontsize=8)
    panels[0][0].set_ylabel("distance to the training set")
    _save(figure, out)


def against_training(study: Study, out: Path) -> None:
    """Distance in two steps at checkpoints of the first seed's runs."""
    figure, panels = _panels(study, height=4.2)
    for plot, title, names in panels:
        for name, style in zip(names, _styles(), strict=False):
            points = sorted(study.in_training(name))
            plot.plot([u for u, _ in points], [d for _, d in points], label=ROWS[name].title, **style)
        plot.set(yscale="log", xlabel="forward passes of one image in training", title=title)
        plot.legend(frameon=False, fontsize=8)
    panels[0][0].set_ylabel("distance in two steps, one seed")
    _save(figure, out)


def samples(study: Study, out: Path) -> None:
    """A row a method, a column a step count: the same noises, at the first seed."""
    figure = Figure(figsize=(11, 0.62 * len(study.rows)), layout="constrained")
    axes: Any = figure.subplots(len(study.rows), len(STEPS), squeeze=False)
    for row, name in zip(axes, study.rows, strict=True):
        run_dir = study.runs(name)[0].outcome.cell.run_dir
        for axis, strip in zip(row, common.strips(run_dir, STEPS, _SAMPLES), strict=True):
            axis.imshow(strip, cmap="gray")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(ROWS[name].title, rotation=0, ha="right", va="center", fontsize=8)
    for axis, steps in zip(axes[0], STEPS, strict=True):
        axis.set_title(f"{steps} step" + "s" * (steps > 1), fontsize=9)
    _save(figure, out)


def _styles() -> list[dict[str, Any]]:
    pairs = zip(_COLOURS, _MARKERS, strict=True)
    return [{"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2} for colour, marker in pairs]


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
