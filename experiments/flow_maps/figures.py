"""The pictures of the page: distances against steps, against training, and samples from one noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.flow_maps.study import ROWS, STEPS, Study
from imm_scale import config as configs
from imm_scale import storage
from imm_scale.checkpoint.export import load_flow_map
from imm_scale.parallel import world
from imm_scale.sampling.draw import collect, plan_of

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


def against_steps(study: Study, out: Path) -> None:
    """Mean distances over seeds with their standard deviation; the upper axis is the cost of a sample."""
    panels = groups(study.rows)
    figure = Figure(figsize=(5.2 * len(panels), 4.8), layout="constrained")
    plots = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for plot, (title, names) in zip(plots, panels.items(), strict=True):
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
    plots[0].set_ylabel("distance to the training set")
    _save(figure, out)


def against_training(study: Study, out: Path) -> None:
    """Distance in two steps at checkpoints of the first seed's runs."""
    panels = groups(study.rows)
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    plots = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for plot, (title, names) in zip(plots, panels.items(), strict=True):
        for name, style in zip(names, _styles(), strict=False):
            points = sorted(study.in_training(name))
            plot.plot([u for u, _ in points], [d for _, d in points], label=ROWS[name].title, **style)
        plot.set(yscale="log", xlabel="forward passes of one image in training", title=title)
        plot.legend(frameon=False, fontsize=8)
    plots[0].set_ylabel("distance in two steps, one seed")
    _save(figure, out)


def samples(study: Study, out: Path) -> None:
    """A row a method, a column a step count: the same noises, at the first seed."""
    figure = Figure(figsize=(11, 0.62 * len(study.rows)), layout="constrained")
    axes: Any = figure.subplots(len(study.rows), len(STEPS), squeeze=False)
    for row, name in zip(axes, study.rows, strict=True):
        for axis, strip in zip(row, _strips(study.runs(name)[0].outcome.cell.run_dir), strict=True):
            axis.imshow(strip, cmap="gray")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(ROWS[name].title, rotation=0, ha="right", va="center", fontsize=8)
    for axis, steps in zip(axes[0], STEPS, strict=True):
        axis.set_title(f"{steps} step" + "s" * (steps > 1), fontsize=9)
    _save(figure, out)


def _strips(run_dir: str) -> list[np.ndarray]:
    """Samples side by side, for each step count."""
    config = configs.from_yaml(storage.read_text(storage.join(run_dir, "config.yaml")))
    spec, flow_map = load_flow_map(run_dir)
    draw = spec.space.artifacts(config.sampling.vae, torch.device("cpu"))
    plans = [plan_of(config.sampling, spec, steps, _SAMPLES, seed=0) for steps in STEPS]
    return [torch.cat(list(draw(collect(flow_map, spec, plan, world.World()))), dim=1).numpy() for plan in plans]


def _styles() -> list[dict[str, Any]]:
    pairs = zip(_COLOURS, _MARKERS, strict=True)
    return [{"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2} for colour, marker in pairs]


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
