"""What became of the cells of a sweep: their states, and one tidy table of their results."""

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imm_scale import storage
from imm_scale.checkpoint import run_folder
from imm_scale.checkpoint.export import RAW_WEIGHTS
from imm_scale.config.schema import Config
from imm_scale.data.manifest import TOKENS_KIND
from imm_scale.errors import UserError
from imm_scale.evaluation import networks
from imm_scale.evaluation.records import conditions, error_of, read_evaluations
from imm_scale.parallel.ema import state_name
from imm_scale.sweeps.definition import Cell, Sweep

RESULTS = "results.parquet"
# In the order of a cell's life. Only "finished" cells have results.
STATES = ("missing", "queued", "running", "interrupted", "failed", "diverged", "finished")
RETRIED = ("failed", "interrupted")
STARTED_BY_SUBMIT = ("missing", "interrupted")


@dataclass(frozen=True)
class Outcome:
    """What is known of a cell.

    Attributes:
        state: one of STATES.
        reason: of a failure or divergence, "" otherwise.
        step: of the newest record.
        code: commit (and hash of what was changed since) of the code that ran it last, "" if it never ran.
        records: of metrics.jsonl.
        results: one mapping per evaluation result of the last step.
    """

    cell: Cell
    state: str
    reason: str = ""
    step: int = 0
    code: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)


def state_url(folder: str, cell: str) -> str:
    """Where the outcome of a cell lies in the sweep's folder."""
    return storage.join(folder, "states", f"{cell}.json")


def write_state(folder: str, cell: str, state: str, reason: str = "", **details: Any) -> None:
    """Says what became of a cell: running | failed | diverged | finished | preempted."""
    document = {"state": state, "reason": reason, **details}
    storage.write_text(state_url(folder, cell), json.dumps(document, indent=1))


def read_state(folder: str, cell: str) -> dict[str, Any]:
    """What `write_state` wrote last, {} if nothing."""
    url = state_url(folder, cell)
    return json.loads(storage.read_text(url)) if storage.exists(url) else {}


def outcome(sweep: Sweep, cell: Cell, activity: str | None = None) -> Outcome:
    """What the folders say of a cell.

    Args:
        activity: "running" or "queued" where a process or the queue has it at this moment.
    """
    written = read_state(sweep.folder, cell.name)
    records = run_folder.read_metrics(cell.run_dir)
    status = run_folder.read_status(cell.run_dir)
    state = activity or _settled(written, status)
    results = list(_results(cell)) if state == "finished" else []
    if state == "finished" and not results:
        state = "interrupted"  # its evaluations were removed: they are made again
    return Outcome(
        cell=cell,
        state=state,
        reason=_reason(written, status, state),
        step=records[-1]["step"] if records else 0,
        code=written.get("code", ""),
        records=records,
        results=results,
    )


def _settled(written: dict[str, Any], status: dict[str, Any]) -> str:
    """The state of a cell that nothing works on, by what it wrote itself, or else by its run's status."""
    state = str((written or status).get("state", "missing"))
    # A run that is complete still has to be measured; one that was refused or gave up has failed.
    return "interrupted" if state in ("running", "preempted", "completed") else state


def _reason(written: dict[str, Any], status: dict[str, Any], state: str) -> str:
    return str((written or status).get("reason", "")) if state in ("failed", "diverged") else ""


def outcomes(sweep: Sweep, activity: Callable[[Cell], str | None] = lambda cell: None) -> list[Outcome]:
    """Of all cells, in the order of the sweep."""
    return [outcome(sweep, cell, activity(cell)) for cell in sweep.cells]


def _results(cell: Cell) -> Iterator[dict[str, Any]]:
    """Of the last checkpoint, drawn and measured as the sweep asks for: what was measured otherwise is left out.

    Each has its `conditions`, and the `ema` it was drawn from.
    """
    for evaluation in read_evaluations(cell.run_dir):
        if evaluation["step"] == cell.config.train.max_steps and _is_as_configured(cell.config, evaluation):
            for result in evaluation["results"]:
                if _is_drawn_as_asked(cell.config, result):
                    said = {"ema": evaluation.get("ema"), "evaluation_seconds": evaluation.get("seconds")}
                    yield {**result, **said, "conditions": conditions(evaluation, result)}


def _is_as_configured(config: Config, evaluation: Mapping[str, Any]) -> bool:
    """By what the file says; what an older one does not say was as it is by default."""
    sampling, evaluated = config.sampling, config.evaluation
    wanted = {key: getattr(sampling, key) for key in ("seed", "grid", "labels", "guidance_interval")}
    wanted["sampler"] = config.method.sampler_named(sampling.sampler)
    wanted |= {key: getattr(evaluated, key) for key in ("repeats", "num", "metrics", "compared")}
    network, decay = networks.identity(evaluated.extractor), sampling.ema
    decay = config.ema.decays[0] if decay is None else decay
    wanted["ema"] = "weight" if decay == RAW_WEIGHTS else state_name(decay)
    made_of = evaluation.get("extractor") or {}
    if made_of.get("kind") == TOKENS_KIND:  # likelihoods of all held-out samples, by no network
        network, wanted = {}, {**wanted, "labels": "all", "order": sampling.order, "brier": evaluated.brier}
    return (
        all(evaluation.get(key, value) == value for key, value in wanted.items())
        and all(made_of.get(key, value) == value for key, value in network.items())
        and (evaluation.get("reference_file") is None) == (evaluated.reference is None)
        and (evaluation.get("guide") is not None) == (sampling.guide.is_set and sampling.guidance_scale != 1.0)
    )


def _is_drawn_as_asked(config: Config, result: Mapping[str, Any]) -> bool:
    sampling = config.sampling
    drawn = (result["precision"], result["compile"], result["guidance_scale"])
    return drawn == (sampling.precision, sampling.compile, sampling.guidance_scale) and (
        result["steps"] in config.evaluation.steps
    )


def divergence(records: Sequence[dict[str, Any]]) -> str:
    """Why a run has diverged, "" if it has not: the first record whose loss or gradient is not finite."""
    for record in records:
        for key in ("loss", "grad_norm"):
            if not math.isfinite(record[key]):
                return f"{key} is {record[key]} at step {record['step']}"
    return ""


# --- the table ---


def rows(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row per cell and evaluation result; a cell without results has one row that says why."""
    table = []
    for one in outcomes:
        common = _cell_columns(sweep, one)
        cell_results: list[dict[str, Any] | None] = [*one.results] or [None]
        for result in cell_results:
            table.append({**common, **_result_columns(one.cell, result)})
    return table


def _cell_columns(sweep: Sweep, one: Outcome) -> dict[str, Any]:
    cell, last = one.cell, one.records[-1] if one.records else {}
    return {
        "sweep": sweep.name,
        "cell": cell.name,
        "state": one.state,
        "reason": one.reason,
        "held_out": cell.held_out,
        **{factor: _plain(cell.factors.get(factor)) for factor in sweep.factors},
        "parameters": cell.parameters,
        "images": cell.images,
        "train_steps": cell.config.train.max_steps,
        "forward_flops": cell.forward_flops,
        "training_flops": cell.training_flops,
        "train_step_reached": one.step,
        "last_loss": last.get("loss"),
        "train_seconds": _train_seconds(one.records),
        "code": one.code or None,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _train_seconds(records: Sequence[dict[str, Any]]) -> float | None:
    """Seconds inside training steps; each record's mean stands for the steps since the one before."""
    total, before = 0.0, 0
    for record in records:
        total += record["step_seconds"] * (record["step"] - before)
        before = record["step"]
    return total if records else None


_DRAWN = ("steps", "function_evaluations", "sampler", "grid", "guidance_scale", "precision", "compile", "ema", "num")

# {column: condition}: what else two results must share, by the words of `evaluation.records.conditions`.
_CONDITIONS = {"reference": "reference", "feature_network": "feature network", "labels": "labels"}


def _result_columns(cell: Cell, result: dict[str, Any] | None) -> dict[str, Any]:
    if result is None:
        return dict.fromkeys(["metric", *_DRAWN, "repeats", *_CONDITIONS, "mean", "std", "error", "inference_flops"])
    under = result["conditions"]
    return {
        **{name: result[name] for name in ("metric", *_DRAWN)},
        "repeats": len(result["values"]),
        **{column: under[name] for column, name in _CONDITIONS.items()},
        "mean": result["mean"],
        "std": result["std"],
        "error": error_of(result),
        # Forward passes per image already count guidance twice, and Heun's second look; a guide has a cost of its own.
        "inference_flops": result["flops_per_image"]
        if result.get("guide")
        else cell.forward_flops * result["function_evaluations"],
    }


def mixed_code(outcomes: Sequence[Outcome]) -> str:
    """A warning that names the commits where the cells were not all run by the same code, else ""."""
    versions: dict[str, list[str]] = {}
    for one in outcomes:
        if one.code:
            versions.setdefault(one.code, []).append(one.cell.name)
    if len(versions) < 2:
        return ""
    parts = [f"{label} ({len(cells)} cells, as {cells[0]})" for label, cells in versions.items()]
    return f"results of different code versions are mixed: {'; '.join(parts)}"


def collect(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """Writes results.parquet into the sweep's folder and returns its place. Raises UserError without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{RESULTS} is written by pyarrow ({error}): pip install 'imm-scale[sweep]'") from error

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows(sweep, outcomes)), buffer)
    url = storage.join(sweep.folder, RESULTS)
    storage.write_bytes(url, buffer.getvalue())
    return url
