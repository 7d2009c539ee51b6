"""The pictures of the page: quality against passes, samples of each head, and tokens of a verified pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments import common
from experiments.joint_tokens.study import FLOORED, Study, over_seeds

_STYLES = {
    "factorized": ("#000000", "o"),
    "mixture": ("#0072B2", "s"),
    "chain": ("#009E73", "D"),
    "autoregressive": ("#D55E00", "^"),
    "uniform_conditioned": ("#CC79A7", "v"),
}
_SAMPLES = 8  # of a head and number of passes
_GAP = 160  # grey between samples


def quality(study: Study, length: int, out: Path) -> None:
    """nll@L per token against passes, mean and deviation over seeds; dotted what products of tokens cannot go below."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axis: Any = figure.subplots()
    steps = study.task.steps
    for name, row in study.task.rows.items():
        colour, marker = _STYLES[name]
        points = [over_seeds([study.result(name, seed, n)["mean"] for seed in study.seeds]) for n in steps]
        means, spread = zip(*points, strict=True)
        title = row.title + (" (bound, one pass without its teacher)" if name == "uniform_conditioned" else "")
        axis.errorbar(steps, means, yerr=spread, color=colour, marker=marker, capsize=2, label=title, linewidth=1.3)
    floors = [
        over_seeds([study.measure(FLOORED, seed, n, "product_floor_per_token")[0] for seed in study.seeds])[0]
        for n in steps
    ]
    axis.plot(steps, floors, color="#000000", linestyle=":", label="floor of products of tokens, any sizes of steps")
    axis.set(xscale="log", xlabel="passes of the net a sequence", ylabel="nll@L, nats a token (lower is better)")
    axis.set_xticks(steps, [str(n) for n in steps], minor=False)
    axis.minorticks_off()
    axis.set_title(f"What a pass can draw: {study.task.title}, {common.plural(len(study.seeds), 'seed')}", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    assert length == steps[-1], "the last point is one token a pass"
    _save(figure, out)


def samples(study: Study, step_counts: Sequence[int], out: Path) -> None:
    """A row a head, a column a number of passes, at the first seed."""
    names = list(study.task.rows)
    figure = Figure(figsize=(3.4 * len(step_counts), 0.5 * len(names) + 0.3), layout="constrained")
    axes: Any = figure.subplots(len(names), len(step_counts), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        run_dir = study.outcomes[name, study.seeds[0]].cell.run_dir
        for axis, strip in zip(row, common.strips(run_dir, step_counts, _SAMPLES), strict=True):
            axis.imshow(_apart(np.asarray(strip)), cmap="gray")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(study.task.rows[name].title, rotation=0, ha="right", va="center", fontsize=8)
    for axis, steps in zip(axes[0], step_counts, strict=True):
        axis.set_title(common.plural(steps, "pass").replace("passs", "passes"), fontsize=9)
    _save(figure, out)


def _apart(strip: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The samples of a strip (H, count W, ...) with a grey column after each but the last."""
    edge = [(0, 0), (0, 1), *[(0, 0)] * (strip.ndim - 2)]
    parts = [np.pad(part, edge, constant_values=_GAP) for part in np.split(strip, _SAMPLES, axis=1)]
    return np.concatenate(parts, axis=1)[:, :-1]


def scaling(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Likelihood against training compute, a line a size; what was held out of the fits is hollow."""
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axis: Any = figure.subplots()
    for index, size in enumerate(dict.fromkeys(row["size"] for row in rows)):
        own = sorted((row["training_flops"], row["mean"], row["held_out"]) for row in rows if row["size"] == size)
        colour = f"C{index}"
        axis.plot([c for c, _, _ in own], [v for _, v, _ in own], color=colour, label=size, linewidth=1.2)
        for flops, value, held_out in own:
            axis.plot(flops, value, "o", color=colour, markerfacecolor="none" if held_out else colour)
    axis.set(xscale="log", xlabel="multiply-adds of training", ylabel="nats a token")
    axis.legend(frameon=False, fontsize=8)
    _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
