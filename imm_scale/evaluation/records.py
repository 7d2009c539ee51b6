"""Evaluation files: where they lie, and those of older versions read as if written today.

RUN/evaluations/step-NNNNNNNN-ID.json, one per (checkpoint, average, steps, sampler, grid, guidance, guide, labels,
precision, compilation, seeds, number, extractor, reference, metrics); ID is a hash of these, so that writers never meet
and nothing is measured twice.
`results` is a list of one entry, of several step counts in files of version 1.
"""

import hashlib
import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """One file, brought to today's schema. Raises UserError for one that is damaged, or of a newer version."""
    document = read_document(url)
    if document["schema_version"] > SCHEMA_VERSION:
        raise UserError(f"{url} was written by a newer imm-scale (schema {document['schema_version']}); update it")
    document = _from_1(document) if document["schema_version"] == 1 else document
    # Before there was a choice the net was drawn from in fp32, not compiled, and guided by the null label.
    results = [{"precision": "fp32", "compile": False, "guide": None, **result} for result in document["results"]]
    results = [{**_axes(document, result), **result} for result in results]
    for result in results:
        if len(result.get("seeds", (0, 0))) == 1:
            result["std"] = None  # which files said to be 0
    return {**document, "results": results}


Values = dict[str, NDArray[np.float64]]


def write_values(url: str, values: Mapping[str, NDArray[np.float64]]) -> None:
    """Keeps what each held-out sample contributed to the evaluation at `url`: (N, ...) by name."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **values)  # type: ignore[arg-type]
    storage.write_bytes(_values_url(url), buffer.getvalue())


def read_values(run_dir: str, step: int) -> list[tuple[dict[str, Any], Values]]:
    """The results of a checkpoint with kept values, each beside its own (N, ...) by name; by sampling steps.

    Samples stand in one order in all evaluations of the same held-out tokens, so that differences are paired.
    """
    folder, found = storage.join(run_dir, FOLDER), []
    names = storage.list_names(folder)
    for name in names:
        url = storage.join(folder, name)
        if name.endswith(".json") and storage.name(_values_url(url)) in names:
            evaluation = read_evaluation(url)
            if evaluation["step"] == step:
                with np.load(io.BytesIO(storage.read_bytes(_values_url(url))), allow_pickle=False) as arrays:
                    found.append((evaluation["results"][0], dict(arrays)))
    return sorted(found, key=lambda one: one[0]["steps"])


def _values_url(url: str) -> str:
    return url.removesuffix(".json") + ".values.npz"


def read_document(url: str) -> dict[str, Any]:
    """One file as it was written. Raises UserError for one that is damaged."""
    try:
        document = json.loads(storage.read_bytes(url))
    except ValueError:
        document = None
    if not isinstance(document, dict) or not {"schema_version", "results"} <= document.keys():
        raise UserError(f"{url} is no evaluation, or damaged: remove it, and evaluate again for its numbers")
    return document


def arithmetic(result: Mapping[str, Any]) -> str:
    """How the net computed for a result, in words: "" for fp32 as it comes, else the precision, and "compiled"."""
    parts = [result["precision"]] + ["compiled"] * result["compile"]
    return "" if parts == ["fp32"] else " ".join(parts)


def guidance(result: Mapping[str, Any]) -> str:
    """Scale of the guidance of a result, and what it leads away from unless that is the null label: "2 by small"."""
    return f"{result['guidance_scale']:g}" + (f" by {result['guide']}" if result.get("guide") else "")


def axes(sequence: float | None, passes: float | None, multiply_adds: int | None) -> dict[str, Any]:
    """What a result says of its cost: passes along the sequence, each so often refined, all of them, and their work."""
    refinement = None if passes is None or not sequence else passes / sequence
    return {
        "sequence_passes": sequence,
        "refinement_passes": refinement,
        "passes": passes,
        "multiply_adds": multiply_adds,
    }


# --- what a result may be held against ---

Conditions = dict[str, str | None]


def conditions(evaluation: Mapping[str, Any], result: Mapping[str, Any]) -> Conditions:
    """What two results must share for their values to be compared, in words by name; None is what a file does not say.

    How samples are drawn (sampler, grid, average) is no such condition: it belongs to what is measured.
    """
    extractor, count = evaluation.get("extractor") or {}, result.get("num")
    network = extractor.get("id")
    images = extractor.get("kind") not in ("latents", "tokens", None)
    return {
        "metric": result.get("metric"),
        "feature network": network and f"{extractor['name']} {network[:12]}",
        "reference": _reference(evaluation),
        "count": None if count is None else str(count),
        "repeats": str(len(result["seeds"])) if "seeds" in result else None,
        "guidance": _guidance(evaluation, result),
        "labels": evaluation.get("labels"),
        "precision": arithmetic(result) or "fp32",
        "decoding precision": evaluation.get("vae_precision") if images else "nothing is decoded",
    }


def _reference(evaluation: Mapping[str, Any]) -> str | None:
    """Its hash, or that of the data it was made of: moments made on other numbers of ranks differ by their rounding."""
    reference = evaluation.get("reference") or {}
    if reference.get("id") is None:
        return None
    if "manifest_hash" not in reference:
        return str(reference["id"][:12])
    made_of = [reference["manifest_hash"], reference.get("codec"), reference.get("image_size"), reference["count"]]
    if (evaluation.get("codec") or {}).get("kind") != "pixels":
        made_of.append(reference.get("posterior_seed"))  # the stored samples are distributions, drawn from with it
    return "training data " + hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]


def _guidance(evaluation: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
    scale, interval = result.get("guidance_scale"), evaluation.get("guidance_interval")
    if scale is None or scale == 1.0:
        return None if scale is None else "1"
    if interval is None:
        return None
    return guidance(result) + ("" if list(interval) == [0.0, 1.0] else f" in {interval}")


def differing(a: Conditions, b: Conditions) -> list[str]:
    """Names of the conditions that two results do not share, or of which one of them does not say."""
    return [name for name, value in a.items() if value is None or value != b.get(name)]


def error_of(result: Mapping[str, Any]) -> float | None:
    """A result's stored error; None where nothing is known of it, as of one seed in files of version 1."""
    error = result.get("error")
    return None if error is None or not math.isfinite(error) else float(error)


def with_error(value: float, error: float | None) -> str:
    """ "0.1234 +- 0.0056", or the value alone where its error is not known."""
    if error is None or not math.isfinite(error):
        return f"{value:.4f}"
    return f"{value:.4f} +- " + (f"{error:.4f}" if error >= 5e-5 else f"{error:.1g}")


def samples(result: Mapping[str, Any]) -> str:
    """Repeats and samples of each, as "5 x 1797"."""
    repeats = len(result["seeds"]) if "seeds" in result else "?"
    return f"{repeats} x {result.get('num') or '?'}"


# --- older versions ---


def _axes(document: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Passes and work of a result that does not say them: then samples had one block, and causal nets no other pass.

    The FLOPs of tokens were those of whole passes, which a net that keeps keys and values does not run.
    """
    passes, flops = result.get("function_evaluations"), result.get("flops_per_image")
    is_tokens = (document.get("extractor") or {}).get("kind") == "tokens"
    sequence = passes if result.get("sampler") in ("blocks", "verified") else 1
    known = None if is_tokens or flops is None else flops // 2
    return axes(sequence, passes, known)


def _from_1(document: dict[str, Any]) -> dict[str, Any]:
    """What a file of version 1 says, in version 2; what it does not say is None."""
    extractor = {"name": document["extractor"], "id": None}
    results = [_result_from_1(result) for result in document["results"]]
    reference = {"id": None, "count": None, "manifest_hash": document["reference"]}
    added = {"training_data": document["reference"], "warnings": [], "weights": None, "metrics": ["frechet"]}
    return {**document, **added, "extractor": extractor, "reference": reference, "results": results}


def _result_from_1(result: dict[str, Any]) -> dict[str, Any]:
    count = len(result["values"])
    error = result["std"] if count > 1 else None  # one seed has no spread
    return {
        **result,
        "value": result["mean"],
        "std": error,
        "error": error,
        "error_kind": f"standard deviation over {count} seeds" if count > 1 else None,
        "count": result["num"],
        "times": None,
        "numerical_error": None,
        "flops_per_image": None,
        "seconds": None,
        "measures": {result["metric"]: {"value": result["mean"], "error": error, "values": result["values"]}},
    }
