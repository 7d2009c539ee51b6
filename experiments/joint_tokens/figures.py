"""The pictures of the page: quality against passes, samples of each head, and tokens of a verified pass."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments import common
from experiments.joint_tokens.prediction import KINDS
from experiments.joint_tokens.study import Study, over_seeds
from imm_scale.methods.tokens import schedules

_STYLES = {
    "factorized": ("#000000", "o"),
    "mixture": ("#0072B2", "s"),
    "chain": ("#009E73", "D"),
    "autoregressive": ("#D55E00", "^"),
    "uniform_conditioned": ("#CC79A7", "v"),
}
_SIZES = {"uniform": "#D55E00", "cosine": "#009E73", "best": "#0072B2"}
_SAMPLES = 8  # of a head and number of passes
_GAP = 160  # grey between samples


def quality(study: Study, floors: Mapping[int, float], out: Path) -> None:
    """nll@L per token against passes, mean and deviation over seeds; dotted what products of tokens cannot go below.

    Args:
        floors: nats a token by number of passes.
    """
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axis: Any = figure.subplots()
    steps = study.task.steps
    for name, row in study.task.rows.items():
        colour, marker = _STYLES[name]
        points = [over_seeds([study.result(name, seed, n)["mean"] for seed in study.seeds]) for n in steps]
        means, spread = zip(*points, strict=True)
        title = row.title + (" (bound, one pass without its teacher)" if name == "uniform_conditioned" else "")
        axis.errorbar(steps, means, yerr=spread, color=colour, marker=marker, capsize=2, label=title, linewidth=1.3)
    axis.plot(
        steps,
        [floors[n] for n in steps],
        color="#000000",
        linestyle=":",
        label="floor of products of tokens, any sizes of steps",
    )
    axis.set(xscale="log", xlabel="passes of the net a sequence", ylabel="nll@L, nats a token (lower is better)")
    axis.set_xticks(steps, [str(n) for n in steps], minor=False)
    axis.minorticks_off()
    axis.set_title(f"What a pass can draw: {study.task.title}, {common.plural(len(study.seeds), 'seed')}", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    _save(figure, out)


def samples(study: Study, step_counts: Sequence[int], out: Path) -> None:
    """A row a head, a column a number of passes, at the first seed."""
    by_head = {
        row.title: common.strips(study.outcomes[name, study.seeds[0]].cell.run_dir, step_counts, _SAMPLES)
        for name, row in study.task.rows.items()
    }
    _draw(by_head, step_counts, out)


def samples_by_sizes(run_dir: str, best: Mapping[int, Sequence[int]], out: Path) -> None:
    """Samples of one net in equal and in best steps, a column a number of passes.

    Args:
        best: sizes by number of passes.
    """
    grids = {"equal": ["uniform"] * len(best), "best": [",".join(map(str, sizes)) for sizes in best.values()]}
    counts = list(best)
    _draw({f"{kind} sizes": common.strips(run_dir, counts, _SAMPLES, own) for kind, own in grids.items()}, counts, out)


def _draw(rows: Mapping[str, Sequence[NDArray[np.uint8]]], step_counts: Sequence[int], out: Path) -> None:
    """Strips of samples by title and number of passes."""
    figure = Figure(figsize=(3.4 * len(step_counts), 0.5 * len(rows) + 0.3), layout="constrained")
    axes: Any = figure.subplots(len(rows), len(step_counts), squeeze=False)
    for row, (title, strips) in zip(axes, rows.items(), strict=True):
        for axis, strip in zip(row, strips, strict=True):
            axis.imshow(_apart(np.asarray(strip)), cmap="gray")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    for axis, steps in zip(axes[0], step_counts, strict=True):
        axis.set_title(common.plural(steps, "pass").replace("passs", "passes"), fontsize=9)
    _save(figure, out)


def _apart(strip: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The samples of a strip (H, count W, ...) with a grey column after each but the last."""
    edge = [(0, 0), (0, 1), *[(0, 0)] * (strip.ndim - 2)]
    parts = [np.pad(part, edge, constant_values=_GAP) for part in np.split(strip, _SAMPLES, axis=1)]
    return np.concatenate(parts, axis=1)[:, :-1]


def sizes(
    excess: Mapping[str, Mapping[int, float]], profile_T: NDArray[np.float64], best: Sequence[int], out: Path
) -> None:
    """A profile with the steps of equal and of best sizes under it, and what each kind of sizes costs.

    Args:
        excess: nats a sequence above one token a pass, by kind of sizes and number of passes.
        profile_T: nats of a token given so many others.
        best: sizes of the steps that are drawn.
    """
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    length = len(profile_T)
    left.plot(np.arange(length), profile_T, color="#000000", linewidth=1.5)
    for kind, own in (("uniform", schedules.sizes_of("uniform", length, len(best))), ("best", best)):
        starts = np.cumsum([0, *own])
        heights = profile_T[starts[:-1]]
        left.stairs(heights, starts, baseline=None, color=_SIZES[kind], label=f"{len(best)} {KINDS[kind]} steps")
    left.set(xlabel="tokens visible", ylabel="nats a token", ylim=(0, None))
    left.set_title("Above the profile: what products lose", fontsize=10)
    for kind, costs in excess.items():
        counts, lost = list(costs), list(costs.values())
        right.plot(counts, lost, color=_SIZES[kind], marker="o", linewidth=1.3, label=f"{KINDS[kind]} sizes")
    right.set(xscale="log", yscale="log", xlabel="passes of the net a sequence", ylabel="excess, nats a sequence")
    right.set_xticks(counts, [str(n) for n in counts], minor=False)
    right.minorticks_off()
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
    _save(figure, out)


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
