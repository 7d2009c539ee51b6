"""Evaluation files: where they lie, and those of older versions read as if written today.

RUN/evaluations/step-NNNNNNNN-ID.json, one per (checkpoint, average, steps, sampler, grid, guidance, guide, labels,
precision, compilation, seeds, number, extractor, reference, metrics); ID is a hash of these, so that writers never meet
and nothing is measured twice.
`results` is a list of one entry, of several step counts in files of version 1.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from imm_scale import storage
from imm_scale.errors import UserError

# 1: one metric, `reference` and `extractor` plain strings. 2: `reference` and `extractor` with ids, and of each result
# value, error, count, times, flops_per_image and measures; one step count per file.
SCHEMA_VERSION = 2
FOLDER = "evaluations"


def evaluation_url(folder: str, step: int | None, settings: Mapping[str, Any]) -> str:
    """Where an evaluation with these settings lies; step is None for an export."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return storage.join(folder, f"step-{step:08d}-{key}.json" if step is not None else f"export-{key}.json")


def read_evaluations(run_dir: str) -> list[dict[str, Any]]:
    """All evaluations of a run, by step of training and then by sampling steps.

    Raises:
        UserError: a file of a newer version.
    """
    folder = storage.join(run_dir, FOLDER)
    names = [name for name in storage.list_names(folder) if name.endswith(".json")]
    evaluations = [read_evaluation(storage.join(folder, name)) for name in names]
    return sorted(evaluations, key=lambda e: (e["step"] or 0, *(r["steps"] for r in e["results"])))


def read_evaluation(url: str) -> dict[str, Any]:
    """One file, brought to today's schema."""
    document: dict[str, Any] = json.loads(storage.read_text(url))
    if document["schema_version"] > SCHEMA_VERSION:
        raise UserError(f"{url} was written by a newer imm-scale (schema {document['schema_version']}); update it")
    document = _from_1(document) if document["schema_version"] == 1 else document
    # Before there was a choice the net was drawn from in fp32, not compiled, and guided by the null label.
    results = [{"precision": "fp32", "compile": False, "guide": None, **result} for result in document["results"]]
    return {**document, "results": results}


def arithmetic(result: Mapping[str, Any]) -> str:
    """How the net computed for a result, in words: "" for fp32 as it comes, else the precision, and "compiled"."""
    parts = [result["precision"]] + ["compiled"] * result["compile"]
    return "" if parts == ["fp32"] else " ".join(parts)


def guidance(result: Mapping[str, Any]) -> str:
    """Scale of the guidance of a result, and what it leads away from unless that is the null label: "2 by small"."""
    return f"{result['guidance_scale']:g}" + (f" by {result['guide']}" if result.get("guide") else "")


def _from_1(document: dict[str, Any]) -> dict[str, Any]:
    """What a file of version 1 says, in version 2; what it does not say is None."""
    extractor = {"name": document["extractor"], "id": None}
    results = [_result_from_1(result) for result in document["results"]]
    reference = {"id": None, "count": None, "manifest_hash": document["reference"]}
    added = {"training_data": document["reference"], "warnings": [], "weights": None, "metrics": ["frechet"]}
    return {**document, **added, "extractor": extractor, "reference": reference, "results": results}


def _result_from_1(result: dict[str, Any]) -> dict[str, Any]:
    summary = {"value": result["mean"], "error": result["std"], "values": result["values"]}
    return {
        **result,
        "value": result["mean"],
        "error": result["std"],
        "error_kind": f"standard deviation over {len(result['seeds'])} seeds",
        "count": result["num"],
        "times": None,
        "numerical_error": None,
        "flops_per_image": None,
        "seconds": None,
        "measures": {result["metric"]: summary},
    }
