"""The page about runs: distances, curves, samples, configs, environment."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.checkpoint import run_folder
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.evaluation import gallery
from imm_scale.evaluation.records import conditions, read_evaluations
from imm_scale.report import comparison, distances, progress
from imm_scale.report.page import COLOURS, axes, image, items, page, svg

_ABSENT = "\N{EM DASH}"  # a key that a run's method or model does not have


@dataclass(frozen=True)
class Run:
    """What a run folder holds, read once.

    Attributes:
        evaluations: of the newest checkpoint that was measured.
        distances: their results, each with its `run` and `method`, its training `step` and its `conditions`.
    """

    dir: str
    config: Config
    records: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    distances: list[dict[str, Any]]
    samples: dict[str, bytes]
    environment: dict[str, Any]
    status: dict[str, Any]

    @property
    def name(self) -> str:
        """`run.name` of its config."""
        return self.config.run.name

    @property
    def progress(self) -> str:
        """What it is doing, and how far it is."""
        step = max([record["step"] for record in self.records], default=self.status.get("step", 0))
        return (
            f"{self.name} is {self.status.get('state', 'starting')}: step {step:,} of {self.config.train.max_steps:,}"
        )


def _is_there(run_dir: str) -> bool:
    return storage.exists(storage.join(run_dir, "config.yaml"))


def read_run(run_dir: str) -> Run:
    """Raises UserError for a folder that is no run."""
    url = storage.join(run_dir, "config.yaml")
    if not _is_there(run_dir):
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml")
    evaluations = read_evaluations(run_dir)
    newest = max((e["step"] for e in evaluations), default=0)
    last = [e for e in evaluations if e["step"] == newest]
    config = configs.from_yaml(storage.read_text(url))
    return Run(
        dir=run_dir,
        config=config,
        records=run_folder.read_metrics(run_dir),
        evaluations=last,
        distances=[
            {
                **result,
                "run": run_dir,
                "method": config.method.name,
                "step": newest,
                "conditions": conditions(e, result),
            }
            for e in last
            for result in e["results"]
        ],
        samples=_read_samples(storage.join(run_dir, "samples")),
        environment=evaluations[-1]["versions"] if evaluations else run_folder.versions(),
        status=run_folder.read_status(run_dir),
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
    return (int(digits) if digits.isdecimal() else 0, name)


def _few_and_many(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    few = [d for run in runs if run.config.method.name != "flow_matching" for d in run.distances]
    return few, [d for run in runs if run.config.method.name == "flow_matching" for d in run.distances]


def comparisons(runs: Sequence[Run]) -> list[str]:
    """Each step count of a few-step method beside what it may be held against (`comparison.lines`)."""
    return comparison.lines(*_few_and_many(runs))


def table(run_dirs: Sequence[str]) -> str:
    """The distances of runs as plain text."""
    runs = [read_run(run_dir) for run_dir in run_dirs]
    return "\n".join(
        [*distances.lines(runs), "", *comparisons(runs), *comparison.unlike(*_few_and_many(runs))]
    ).rstrip()


# --- figures ---


def curve_figure(runs: Sequence[Run]) -> str:
    """Loss and gradient norm of each run; losses of different objectives are not comparable, so each has its axes."""
    figure = Figure(figsize=(8, 2.4 * len(runs)), layout="constrained")
    for row, (colour, run) in enumerate(zip(COLOURS * len(runs), runs, strict=False)):
        steps = [record["step"] for record in run.records]
        for column, key in enumerate(("loss", "grad_norm")):
            plot = axes(figure, len(runs), 2, 2 * row + column + 1)
            plot.plot(steps, [record[key] for record in run.records], color=colour, linewidth=1)
            plot.set_title(f"{run.name}: {key.replace('_', ' ')}", fontsize=10, loc="left")
            plot.set_xlabel("step")
    return image("image/svg+xml", svg(figure))


# --- page ---


def _warnings(runs: Sequence[Run]) -> str:
    """What the evaluations say a reader must know, such as an average that is still young."""
    lines = sorted({(run.name, line) for run in runs for e in run.evaluations for line in e["warnings"]})
    return "".join(f'<p class="warning">{html.escape(name)}: {html.escape(line)}</p>' for name, line in lines)


def _sample_section(run: Run) -> str:
    if not run.samples:
        return ""
    figures = "".join(
        f"<figure>{image('image/png', data, name)}<figcaption>{html.escape(_caption(name))}</figcaption></figure>"
        for name, data in run.samples.items()
    )
    return f'<h3>{html.escape(run.name)}</h3><div class="samples">{figures}</div>'


def _caption(name: str) -> str:
    steps, _, rest = name.removesuffix(".png").removeprefix("steps-").partition("-")
    qualifiers = rest.replace("-", " ").replace(" guide ", " by weights ")
    return f"{steps} step" + ("" if steps == "1" else "s") + (f", {qualifiers}" if qualifiers else "")


def _config_section(runs: Sequence[Run]) -> str:
    flat = [configs.flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)  # another method or model has other keys
    differing = [key for key in keys if any(values.get(key, _ABSENT) != flat[0].get(key, _ABSENT) for values in flat)]
    rows = "".join(
        f"<tr><td>{key}</td>"
        + "".join(f"<td>{html.escape(str(values.get(key, _ABSENT)))}</td>" for values in flat)
        + "</tr>"
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


def write_report(run_dirs: Sequence[str], out: str, reload: float | None = None) -> None:
    """Writes the page.

    Args:
        reload: seconds after which a browser looks again; then a run may be one that is not there yet.

    Raises:
        UserError: a folder that is no run.
    """
    absent = [run_dir for run_dir in run_dirs if reload is not None and not _is_there(run_dir)]
    runs = [read_run(run_dir) for run_dir in run_dirs if run_dir not in absent]
    title = " and ".join(run.name for run in runs) or "waiting for a run"
    storage.write_text(out, page(title, _states(runs, absent) + _body(runs), reload))


def _states(runs: Sequence[Run], absent: Sequence[str]) -> str:
    """A line a run: how far it is."""
    return items([run.progress for run in runs] + [f"{storage.shown(url)} has not started yet" for url in absent])


def _body(runs: Sequence[Run]) -> str:
    if not runs:
        return ""
    lead = "".join(f"<li>{html.escape(line)}</li>" for line in comparisons(runs))
    lead_section = f'<p class="lead">Distances, few steps over many:</p><ul class="lead">{lead}</ul>' if lead else ""
    unlike = comparison.unlike(*_few_and_many(runs))
    lead_section += f'<div class="warning">{items(unlike)}</div>' if unlike else ""
    distance_section = sample_section = ""
    if any(run.distances for run in runs):
        distance_section = f"<h2>Distance against steps</h2>{distances.section(runs)}{_warnings(runs)}"
    if any(run.samples for run in runs):
        samples = "".join(_sample_section(run) for run in runs)
        sample_section = f"<h2>Samples</h2><p>A row a class; the same noise at every step count.</p>{samples}"
    learning = "".join(_progress_section(run) for run in runs)
    learning_section = f"<h2>Samples while it learned</h2>{learning}" if learning else ""
    pictures = "".join(
        f"<h2>Gallery of {html.escape(r.name)}</h2>{part}" for r in runs if (part := gallery.section(r.dir))
    )
    environment = html.escape(json.dumps({run.name: run.environment for run in runs}, indent=1))
    return f"""{lead_section}
{distance_section}
{sample_section}
{learning_section}
{pictures}
<h2>Training</h2>
<p>The IMM loss starts small and need not fall to 0: at the optimum the particles of a group still differ. Distances of
samples say more than it does.</p>
{curve_figure(runs)}
<h2>Configs</h2>
{_config_section(runs)}
<h2>Environment</h2>
<pre>{environment}</pre>"""


def _progress_section(run: Run) -> str:
    part = progress.section(run.dir, run.config.sampling)
    return f"<h3>{html.escape(run.name)}</h3>{part}" if part else ""
