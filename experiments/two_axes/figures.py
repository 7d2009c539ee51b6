"""The pictures of the page: the figures of `imm-scale report --axes`, and samples of blocks drawn in few steps."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from experiments import common
from experiments.two_axes.study import STEPS, TITLES, Study
from imm_scale.report.axes import figures
from imm_scale.report.axes.points import Column

_SAMPLES = 10  # of a step count


def axes(column: Column, images: str, docs: Path) -> None:
    """The map of both axes, and quality against work and against passes: IMAGES_{map,work,passes}.png below docs."""
    for name, figure in (
        ("map", figures.axes_map(column)),
        ("work", figures.quality(column, "work")),
        ("passes", figures.quality(column, "passes")),
    ):
        _save(figure, docs / f"{images}_{name}.png")


def samples(study: Study, blocks: int, out: Path) -> None:
    """Rows of step counts, of both methods, from the same noises at the first seed."""
    rows = [
        (f"{TITLES[method]}, {common.plural(steps, 'step')}", strip)
        for method, counts in STEPS.items()
        for steps, strip in zip(counts, common.strips(study.run_dir(method, blocks), counts, _SAMPLES), strict=True)
    ]
    figure = Figure(figsize=(8, 0.8 * len(rows)), layout="constrained")
    plots: Any = figure.subplots(len(rows), 1)
    for plot, (title, strip) in zip(plots, rows, strict=True):
        plot.imshow(strip, cmap="gray")
        plot.set(xticks=[], yticks=[])
        plot.spines[:].set_visible(False)
        plot.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, bbox_inches="tight")
