"""The page about a sweep: samples by size and steps, laws with bands, optimal sizes, predictions, all cells."""

import html
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.errors import UserError
from imm_scale.evaluation.records import with_error
from imm_scale.report import sweep_figures as figures
from imm_scale.report.page import image, items, page, table
from imm_scale.sweeps import definition, results
from imm_scale.sweeps.definition import Sweep
from imm_scale.sweeps.results import Outcome
from imm_scale.sweeps.study import Study, analyse, measured, measured_under


@dataclass(frozen=True)
class Findings:
    """Everything the page is made from."""

    sweep: Sweep
    outcomes: list[Outcome]
    rows: list[dict[str, Any]]
    usable: list[Mapping[str, Any]]
    study: Study
    label: str


def read(path: str) -> Findings:
    """Raises UserError for a folder without a sweep, or a sweep without a single result."""
    sweep = definition.load(path)
    sweep = definition.load(sweep.folder) if not definition.is_folder(path) else sweep
    outcomes = results.outcomes(sweep)
    rows = results.rows(sweep, outcomes)
    study = analyse(rows)
    return Findings(sweep, outcomes, rows, measured(rows, study.metric), study, _label(sweep))


def _label(sweep: Sweep) -> str:
    """The factor whose values the figures tell apart: the size, or what varies instead."""
    varying = [key for key in sweep.factors if len({str(cell.factors[key]) for cell in sweep.cells}) > 1]
    choices = [key for key in varying if key in ("size", "variant")] or [key for key in varying if key != "seed"]
    return choices[0] if choices else "cell"


# --- figures ---


def draw(findings: Findings) -> dict[str, bytes]:
    """{file name: SVG or PNG} of every figure of the page."""
    study, usable = findings.study, findings.usable
    drawn: dict[str, bytes] = {}
    pictures = _pictures(findings)
    if pictures:
        drawn["samples.png"] = figures.sample_matrix(pictures)
    if "size" in usable[0]:
        for steps in study.steps:
            drawn[f"training-{steps}.svg"] = figures.training_figure(study, usable, steps)
        drawn["inference.svg"] = figures.inference_figure(study, usable)
        if usable[0].get("budget_flops") is not None:
            for steps in study.steps:
                drawn[f"isoflop-{steps}.svg"] = figures.isoflop_figure(study, usable, steps)
    else:
        for factor in [key for key in findings.sweep.factors if key != "seed"] or ["cell"]:
            drawn[f"steps-{factor}.svg"] = figures.steps_figure(study.metric, usable, factor)
    labels = {one.cell.name: str(one.cell.factors.get(findings.label, one.cell.name)) for one in findings.outcomes}
    drawn["loss.svg"] = figures.curve_figure(findings.outcomes, "loss", labels)
    drawn["gradient.svg"] = figures.curve_figure(findings.outcomes, "grad_norm", labels)
    return drawn


def _pictures(findings: Findings) -> dict[str, dict[int, np.ndarray]]:
    """{row: {steps: images}} of the first seed's largest finished run of each row."""
    chosen: dict[str, Outcome] = {}
    for one in findings.outcomes:
        if one.state == "finished":
            row = _row_name(findings, one)
            best = chosen.get(row)
            if best is None or one.cell.training_flops > best.cell.training_flops * 1.01:
                chosen[row] = one
    pictures = {}
    for row, one in chosen.items():
        folder = storage.join(one.cell.run_dir, "samples", f"step-{one.cell.config.train.max_steps:08d}")
        by_steps = {}
        for name in storage.list_names(folder):
            if name.endswith(".npz"):
                with np.load(io.BytesIO(storage.read_bytes(storage.join(folder, name)))) as arrays:
                    by_steps[json.loads(str(arrays["settings"]))["steps"]] = arrays["arr_0"]
        if by_steps:
            pictures[row] = by_steps
    return pictures


def _row_name(findings: Findings, one: Outcome) -> str:
    """What stands beside a row of samples: the size, or everything but the seed."""
    factors = one.cell.factors
    if "size" in factors:
        return str(factors["size"])
    return ", ".join(str(value) for key, value in factors.items() if key != "seed") or one.cell.name


# --- tables ---


def _cell_table(findings: Findings) -> str:
    steps = findings.study.steps
    by_cell: dict[str, dict[int, str]] = {}
    for row in findings.usable:
        by_cell.setdefault(row["cell"], {})[row["steps"]] = with_error(row["mean"], row["error"])
    head = ["cell", "state", "parameters", "images", "training FLOPs", *[f"{s} steps" for s in steps], "note"]
    rows = []
    for one in findings.outcomes:
        cell, distances = one.cell, by_cell.get(one.cell.name, {})
        shown = [distances.get(s, "") for s in steps]
        note = one.reason or ("held out" if cell.held_out else "")
        common = [cell.name, one.state, f"{cell.parameters:,}", f"{cell.images:,}", f"{cell.training_flops:.3g}"]
        rows.append([*common, *shown, note])
    return table(head, rows)


def _law_tables(study: Study) -> str:
    parts = []
    if study.powers:
        rows = [
            [size, steps, *(str(value) for value in law.intervals().values()), len(law.residuals_n)]
            for (size, steps), law in study.powers.items()
        ]
        parts.append("<p>E + A / C<sup>p</sup>, C the training FLOPs of one size:</p>")
        parts.append(table(["size", "steps", "E", "A", "p", "points"], rows))
    if study.joints:
        rows = [
            [steps, *(str(value) for value in law.intervals().values()), len(law.residuals_n)]
            for steps, law in study.joints.items()
        ]
        parts.append("<p>E + A / N<sup>alpha</sup> + B / D<sup>beta</sup>, N parameters and D images:</p>")
        parts.append(table(["steps", "E", "A", "alpha", "B", "beta", "points"], rows))
    return "".join(parts)


def _optimum_table(study: Study) -> str:
    rows = [
        [steps, optimum.method, f"{minimum.budget:.3g}", str(minimum.size), f"{minimum.loss:.4g}", minimum.note]
        for steps, optima in study.optima.items()
        for optimum in optima
        for minimum in optimum.minima
    ]
    growth = [
        f"{steps} steps, {optimum.method}: best size ~ C^{optimum.exponent}"
        for steps, optima in study.optima.items()
        for optimum in optima
    ]
    head = ["steps", "method", "budget", "best size (parameters)", "distance there", "note"]
    return table(head, rows) + items(growth) if rows else ""


def _prediction_section(study: Study) -> str:
    parts = []
    if study.checks:
        inside = sum(check.inside for check in study.checks)
        rows = [
            [c.cell, c.steps, str(c.predicted), f"{c.measured:.4g}", "inside" if c.inside else "outside"]
            for c in study.checks
        ]
        parts.append(f"<p>Held-out cells: {inside} of {len(rows)} lie inside their 90 % prediction interval.</p>")
        parts.append(table(["cell", "steps", "predicted", "measured", ""], rows))
    if study.forecasts:
        rows = [
            [f.steps, f"{f.training_flops:.3g}", str(f.parameters), f"{f.images:,.0f}", str(f.distance)]
            for f in study.forecasts
        ]
        parts.append("<p>The next budget, by the joint law:</p>")
        parts.append(table(["steps", "training FLOPs", "best size (parameters)", "images", "distance"], rows))
    return "".join(parts)


def _choice_table(study: Study) -> str:
    rows = [
        [f"{c.target:.4g}", c.size, c.steps, f"{c.distance:.4g}", f"{c.inference_flops:.3g}", f"{c.training_flops:.3g}"]
        for c in study.choices
    ]
    head = ["wanted distance", "size", "steps", "reached", "inference FLOPs per image", "training FLOPs"]
    return table(head, rows) if rows else ""


# --- page ---


def _figures(drawn: Mapping[str, bytes], names: Sequence[str]) -> str:
    pictures = "".join(f"<figure>{_picture(name, drawn[name])}</figure>" for name in names if name in drawn)
    return f'<div class="figures">{pictures}</div>'


def _picture(name: str, data: bytes) -> str:
    return image("image/svg+xml" if name.endswith(".svg") else "image/png", data, name)


def _summary(findings: Findings) -> str:
    counts = Counter(one.state for one in findings.outcomes)
    states = ", ".join(f"{counts[state]} {state}" for state in results.STATES if counts[state])
    flops = sum(one.cell.training_flops for one in findings.outcomes if one.state == "finished")
    lines = [findings.sweep.description] if findings.sweep.description else []
    lines.append(f"{len(findings.outcomes)} cells: {states}. Training of the finished ones: {flops:.3g} FLOPs.")
    lines.append(f"Distances: {measured_under(findings.usable)}.")
    lines.append(
        "FLOPs count a multiply-add once. Training takes 4 forward passes per image (3 for flow matching), "
        "inference one per step, two with guidance."
    )
    text = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    warning = results.mixed_code(findings.outcomes)
    return text + (f'<p class="warning">{html.escape(warning)}</p>' if warning else "")


def _scaling_sections(findings: Findings, drawn: Mapping[str, bytes]) -> list[tuple[str, str]]:
    study = findings.study
    training = _figures(drawn, [f"training-{steps}.svg" for steps in study.steps])
    isoflop = _figures(drawn, [f"isoflop-{steps}.svg" for steps in study.steps])
    minima = "<p>Curves: the joint law. Crosses: minima by parabola; diamonds: by variable projection.</p>"
    return [
        ("Quality against training compute", training + _law_tables(study)),
        ("Quality against inference compute", _figures(drawn, ["inference.svg"]) + _choice_table(study)),
        ("The best size for a budget", minima + isoflop + _optimum_table(study) if study.optima else ""),
        ("Predictions", _prediction_section(study)),
    ]


def _sections(findings: Findings, drawn: Mapping[str, bytes]) -> list[tuple[str, str]]:
    study = findings.study
    sections = []
    if "samples.png" in drawn:
        matrix = f'<div class="wide">{_picture("samples.png", drawn["samples.png"])}</div>'
        caption = "<p>The largest budget, the first seed, the same noise everywhere.</p>"
        sections.append(("Samples", caption + matrix))
    if any(name.startswith("training-") for name in drawn):
        sections += _scaling_sections(findings, drawn)
    else:
        names = [name for name in drawn if name.startswith("steps-")]
        sections.append(("Distance against steps", _figures(drawn, names)))
    sections.append(("What the data cannot tell", items(study.notes) if study.notes else ""))
    sections.append(("Cells", _cell_table(findings)))
    curves = "<p>The IMM loss has a moving target and compares no two runs: distances do.</p>"
    sections.append(("Training curves", curves + _figures(drawn, ["loss.svg", "gradient.svg"])))
    sections.append(("Config and code", _config_section(findings)))
    return [(title, body) for title, body in sections if body]


def _config_section(findings: Findings) -> str:
    code = html.escape(", ".join(sorted({one.code for one in findings.outcomes if one.code})))
    first = findings.outcomes[0].cell
    return (
        f"<p>Code: {code}</p>"
        f"<details><summary>{html.escape(first.name)}: whole config</summary>"
        f"<pre>{html.escape(configs.to_yaml(first.config))}</pre></details>"
    )


def write_report(path: str, out: str, figures_dir: str | None = None) -> list[str]:
    """Writes the page of a sweep folder (or file), and its figures as files too where asked.

    Returns:
        Lines that say in plain text what the page shows.

    Raises:
        UserError: no sweep there, or nothing measured yet.
    """
    findings = read(path)
    drawn = draw(findings)
    body = _summary(findings)
    body += "".join(f"<h2>{html.escape(title)}</h2>{text}" for title, text in _sections(findings, drawn))
    storage.write_text(out, page(findings.sweep.name, body))
    for name, data in drawn.items() if figures_dir else ():
        storage.write_bytes(storage.join(str(figures_dir), name), data)
    return _lines(findings.study, findings.usable)


def _lines(study: Study, usable: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"distances: {measured_under(usable)}"]
    for steps, law in study.joints.items():
        constants = ", ".join(f"{name} {value}" for name, value in law.intervals().items())
        lines.append(f"joint law, {steps} steps: {constants}")
    for check in study.checks:
        comparison = f"predicted {check.predicted}, measured {check.measured:.4g}"
        lines.append(f"held out, {check.cell}, {check.steps} steps: {comparison}")
    return lines + [f"note: {note}" for note in study.notes]


def check_single(paths: Sequence[str]) -> bool:
    """Whether the paths are one sweep. Raises UserError for a sweep among others."""
    sweeps = [path for path in paths if path.endswith((".yaml", ".yml")) or definition.is_folder(path)]
    if sweeps and len(paths) > 1:
        raise UserError(f"{sweeps[0]} is a sweep: a page shows one sweep, or any number of runs")
    return bool(sweeps)
