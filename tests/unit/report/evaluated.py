"""Run folders with evaluations in them, written out, that no net was trained for."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imm_scale import config as configs
from imm_scale.evaluation.records import FOLDER, SCHEMA_VERSION, axes

IMAGES, TOKENS = "frechet_latents", "nll_per_token"


def image(steps: int, blocks: int, work: float, values: Sequence[float]) -> dict[str, Any]:
    """The result of so many steps in each of so many blocks, a value a sampling seed."""
    return _result(IMAGES, steps, values, blocks, blocks * steps, work, "pushforward")


def tokens(
    steps: int, passes: tuple[float, float], work: float, nll: float, alone: float, floor: float | None = None
) -> dict[str, Any]:
    """The result of (sequence, refinement) passes; `alone` is the nll of one token at a time."""
    sampler = "unmask" if passes[0] == 1 else "blocks"
    result = _result(TOKENS, steps, [nll], passes[0], passes[0] * passes[1], work, sampler)
    result["measures"] |= {"nll_one_at_a_time": {"value": alone, "error": 0.001, "values": [alone]}}
    if floor is not None:
        result["measures"] |= {"product_floor_per_token": {"value": floor, "error": 0.001, "values": [floor]}}
    return result


def _result(
    metric: str, steps: int, values: Sequence[float], sequence: float, passes: float, work: float, sampler: str
) -> dict[str, Any]:
    value, error = sum(values) / len(values), 0.001
    return {
        "metric": metric, "steps": steps, "function_evaluations": passes, "sampler": sampler, "grid": "uniform",
        "guidance_scale": 1.0, "num": 256, "seeds": list(range(len(values))), "values": list(values), "mean": value,
        "value": value, "error": error, **axes(sequence, passes, round(work)), "precision": "fp32", "compile": False,
        "measures": {metric: {"value": value, "error": error, "values": list(values)}},
    }  # fmt: skip


def run(folder: Path, results: Sequence[Mapping[str, Any]], *words: str) -> str:
    """A run folder of a config of these words and these results, each in a file of its own."""
    config = configs.load_words([f"run.dir={folder}", f"run.name={folder.name}", "wandb.mode=disabled", *words]).config
    (folder / FOLDER).mkdir(parents=True)
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    kind = "tokens" if results and results[0]["metric"] == TOKENS else "latents"
    document = {
        "schema_version": SCHEMA_VERSION, "step": 1, "ema": "ema-0.99", "labels": "all", "warnings": [],
        "guidance_interval": [0.0, 1.0], "vae_precision": None, "versions": {}, "codec": {"kind": "pixels"},
        "extractor": {"name": kind, "id": "e" * 64, "kind": kind}, "tokens": 64 if kind == "tokens" else None,
        "reference": {"id": "a" * 64, "count": 256},
    }  # fmt: skip
    for number, result in enumerate(results):
        name = f"step-00000001-{number:012x}.json"
        (folder / FOLDER / name).write_text(json.dumps({**document, "results": [result]}))
    return str(folder)
