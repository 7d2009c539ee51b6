"""One self-contained HTML page about runs: distances, curves, samples, configs, environment."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.errors import UserError
from imm_scale.evaluation.run import read_evaluations
from imm_scale.training import metrics

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px; margin: 0 auto;
       padding: 1rem; }
h1 { font-size: 1.7rem; margin: 0.5rem 0; } h2 { font-size: 1.25rem; margin: 2rem 0 0.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.samples { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; }
.samples figure { flex: 0 1 auto; max-width: 260px; } figcaption { font-size: 0.9rem; color: #444; }
img { max-width: 100%; height: auto; } .samples img { image-rendering: pixelated; width: 260px; }
pre { background: #f6f6f6; padding: 0.7rem; overflow-x: auto; font-size: 0.8rem; }
.lead { font-size: 1.1rem; }
"""


@dataclass(frozen=True)
class Run:
    """What a run folder holds, read once."""

    dir: str
    config: configs.Config
    records: list[dict[str, Any]]
    distances: list[dict[str, Any]]
    samples: dict[str, bytes]
    environment: dict[str, Any]

    @property
    def name(self) -> str:
        return self.config.run.name


def read_run(run_dir: str) -> Run:
    """Raises UserError for a folder that is no run."""
    url = storage.join(run_dir, "config.yaml")
    if not storage.exists(url):
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml")
    evaluations = read_evaluations(run_dir)
    newest = max((e["step"] for e in evaluations), default=0)
    return Run(
        dir=run_dir,
        config=configs.from_yaml(storage.read_text(url)),
        records=metrics.read_metrics(run_dir),
        distances=[{**result, "step": newest} for e in evaluations if e["step"] == newest for result in e["results"]],
        samples=_read_samples(storage.join(run_dir, "samples")),
        environment=evaluations[-1]["versions"] if evaluations else metrics.versions(),
    )


def _read_samples(url: str) -> dict[str, bytes]:
    """{file name: PNG} of the newest samples, by step count."""
    folders = storage.list_names(url)
    if not folders:
        return {}
    newest = storage.join(url, folders[-1])
    names = [name for name in storage.list_names(newest) if name.endswith(".png")]
    return {name: storage.read_bytes(storage.join(newest, name)) for name in sorted(names, key=_by_steps)}


def _by_steps(name: str) -> tuple[int, str]:
    digits = name.removeprefix("steps-").split(".")[0].split("-")[0]
    return (int(digits) if digits.isdigit() else 0, name)


def comparisons(runs: Sequence[Run]) -> list[str]:
    """Each step count of an IMM run beside the flow-matching result with at least ten times as many."""
    few = [d for run in runs if run.config.objective.name == "imm" for d in run.distances]
    many = [d for run in runs if run.config.objective.name == "flow_matching" for d in run.distances]
    lines = []
    for ours in few:
        longer = [d for d in many if d["steps"] >= 10 * ours["steps"] and d["metric"] == ours["metric"]]
        if longer:
            theirs = min(longer, key=lambda d: d["steps"])
            lines.append(
                f"IMM with {ours['steps']} against flow matching with {theirs['steps']} steps: "
                f"{ours['mean']:.4f} / {theirs['mean']:.4f} = {ours['mean'] / theirs['mean']:.2f}"
            )
    return lines


def table(run_dirs: Sequence[str]) -> str:
    """The distances of runs as plain text."""
    runs = [read_run(run_dir) for run_dir in run_dirs]
    lines = [f"{'run':<24} {'steps':>6} {'evaluations':>12} {'distance':>20}  metric"]
    for run in runs:
        for d in run.distances:
            value = f"{d['mean']:.4f} +- {d['std']:.4f}"
            lines.append(f"{run.name:<24} {d['steps']:>6} {d['function_evaluations']:>12} {value:>20}  {d['metric']}")
    return "\n".join([*lines, "", *comparisons(runs)]).rstrip()


# --- figures ---


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return _image("image/svg+xml", buffer.getvalue())


def _image(kind: str, data: bytes, alt: str = "") -> str:
    return f'<img alt="{html.escape(alt)}" src="data:{kind};base64,{base64.b64encode(data).decode()}">'


def _axes(figure: Figure, *place: int) -> Any:
    axes = figure.add_subplot(*place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return axes


def distance_figure(runs: Sequence[Run]) -> str:
    """Distance against function evaluations of all runs, error bars over sampling seeds."""
    figure = Figure(figsize=(8, 4.5))
    axes = _axes(figure, 1, 1, 1)
    for colour, run in zip(_COLOURS * len(runs), runs, strict=False):
        points = sorted(run.distances, key=lambda d: d["function_evaluations"])
        if points:
            axes.errorbar(
                [d["function_evaluations"] for d in points],
                [d["mean"] for d in points],
                yerr=[d["std"] for d in points],
                marker="o",
                capsize=3,
                color=colour,
                label=run.name,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({d["function_evaluations"] for run in runs for d in run.distances})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    metrics_named = sorted({d["metric"] for run in runs for d in run.distances})
    axes.set_xlabel("function evaluations per image")
    axes.set_ylabel(f"distance to the training images ({', '.join(metrics_named)})")
    axes.legend(frameon=False)
    return _svg(figure)


def curve_figure(runs: Sequence[Run]) -> str:
    """Loss and gradient norm of each run; losses of different objectives are not comparable, so each has its axes."""
    figure = Figure(figsize=(8, 2.4 * len(runs)), layout="constrained")
    for row, (colour, run) in enumerate(zip(_COLOURS * len(runs), runs, strict=False)):
        steps = [record["step"] for record in run.records]
        for column, key in enumerate(("loss", "grad_norm")):
            axes = _axes(figure, len(runs), 2, 2 * row + column + 1)
            axes.plot(steps, [record[key] for record in run.records], color=colour, linewidth=1)
            axes.set_title(f"{run.name}: {key.replace('_', ' ')}", fontsize=10, loc="left")
            axes.set_xlabel("step")
    return _svg(figure)


# --- page ---


def _distance_table(runs: Sequence[Run]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(run.name)}</td><td>{d['steps']}</td><td>{d['function_evaluations']}</td>"
        f"<td>{d['mean']:.4f} &plusmn; {d['std']:.4f}</td><td>{len(d['seeds'])} &times; {d['num']}</td>"
        f"<td>{d['grid']}</td><td>{d['guidance_scale']:g}</td><td>{html.escape(d['metric'])}</td></tr>"
        for run in runs
        for d in run.distances
    )
    head = "<tr><th>run</th><th>steps</th><th>evaluations</th><th>distance</th><th>samples</th>"
    head += "<th>grid</th><th>guidance</th><th>metric</th></tr>"
    return f'<div class="wide"><table>{head}{rows}</table></div>'


def _sample_section(run: Run) -> str:
    if not run.samples:
        return ""
    figures = "".join(
        f"<figure>{_image('image/png', data, name)}<figcaption>{html.escape(_caption(name))}</figcaption></figure>"
        for name, data in run.samples.items()
    )
    return f'<h3>{html.escape(run.name)}</h3><div class="samples">{figures}</div>'


def _caption(name: str) -> str:
    words = name.removesuffix(".png").removeprefix("steps-").split("-")
    plural = "" if words[0] == "1" else "s"
    return f"{words[0]} step{plural}" + (f", guidance {words[2]}" if len(words) > 2 else "")


def _config_section(runs: Sequence[Run]) -> str:
    flat = [configs.flatten(run.config) for run in runs]
    differing = [key for key in flat[0] if any(other[key] != flat[0][key] for other in flat[1:])]
    rows = "".join(
        f"<tr><td>{key}</td>" + "".join(f"<td>{html.escape(str(values[key]))}</td>" for values in flat) + "</tr>"
        for key in differing
    )
    head = "<tr><th>key</th>" + "".join(f"<th>{html.escape(run.name)}</th>" for run in runs) + "</tr>"
    compared = f'<p>What differs:</p><div class="wide"><table>{head}{rows}</table></div>' if differing else ""
    full = "".join(
        f"<details><summary>{html.escape(run.name)}: whole config</summary>"
        f"<pre>{html.escape(configs.to_yaml(run.config))}</pre></details>"
        for run in runs
    )
    return compared + full


def write_report(run_dirs: Sequence[str], out: str) -> None:
    """Writes the page. Raises UserError for a folder that is no run."""
    runs = [read_run(run_dir) for run_dir in run_dirs]
    lead = "".join(f"<li>{html.escape(line)}</li>" for line in comparisons(runs))
    lead_section = f'<p class="lead">Distances, few steps over many:</p><ul class="lead">{lead}</ul>' if lead else ""
    distance_section = sample_section = ""
    if any(run.distances for run in runs):
        distance_section = f"<h2>Distance against steps</h2>{distance_figure(runs)}{_distance_table(runs)}"
    if any(run.samples for run in runs):
        samples = "".join(_sample_section(run) for run in runs)
        sample_section = f"<h2>Samples</h2><p>A row a class; the same noise at every step count.</p>{samples}"
    environment = html.escape(json.dumps({run.name: run.environment for run in runs}, indent=1))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>imm-scale: {html.escape(", ".join(run.name for run in runs))}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(" and ".join(run.name for run in runs))}</h1>
{lead_section}
{distance_section}
{sample_section}
<h2>Training</h2>
<p>The IMM loss starts small and need not fall to 0: at the optimum the particles of a group still differ. Distances of
samples say more than it does.</p>
{curve_figure(runs)}
<h2>Configs</h2>
{_config_section(runs)}
<h2>Environment</h2>
<pre>{environment}</pre>
</body></html>
"""
    storage.write_text(out, page)
