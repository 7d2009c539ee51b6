"""What a step of each row costs: forward passes as counted, time as measured here, memory of an XL net as modelled."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import step as bench
from benchmarks.gpu.timing import ratios, seconds
from experiments.flow_maps.study import CONFIGS, ROWS, Study
from imm_scale import config as configs
from imm_scale import storage
from imm_scale.planner import estimate
from imm_scale.sweeps import definition

_ROUNDS, _SIZE, _SIDE, _SAMPLES = 5, "DiT-S/2", 8, 16
_GPU = "h100-80gb"


def of_rows(study: Study) -> dict[str, dict[str, Any]]:
    """{row: {"forwards": of an image in a step, "time": of a step over flow matching's, "memory": GiB}}."""
    times = _times(study.folder / "times.json")
    found = {}
    for name in study.rows:
        row = ROWS[name]
        config = study.runs(name)[0].outcome.cell.config
        kind = "imm" if row.preset is None and config.method.name == "imm" else row.preset or "flow_matching"
        found[name] = {
            "forwards": definition.step_passes(config).forwards,
            "time": times[kind],
            "memory": _memory(row.preset, row.settings),
        }
    return found


def _times(path: Path) -> Mapping[str, float]:
    """Median ratio to flow matching's step, measured once, all methods in turn."""
    if not storage.exists(str(path)):
        steps = bench.method_steps(_SIZE, _SIDE, _SAMPLES)
        measured = seconds([step for _, step in steps.values()], _ROUNDS)
        base = measured[list(steps).index("flow_matching")]
        result = {name: statistics.median(ratios(values, base)) for name, values in zip(steps, measured, strict=True)}
        storage.write_text(str(path), json.dumps(result, indent=1))
    times: dict[str, float] = json.loads(storage.read_text(str(path)))
    return times


def _memory(preset: str | None, settings: Mapping[str, Any]) -> float:
    """GiB of a rank at most, DiT-XL/2 on 8 H100, bf16, ZeRO 2, micro-batches of 32, blocks recomputed."""
    files = [str(CONFIGS / "imagenet256_dit_xl2.yaml")] + ([str(CONFIGS / f"method/{preset}.yaml")] if preset else [])
    base = configs.unfinished(files)
    settings = {key: value for key, value in settings.items() if key.startswith("method.")} | {
        "data.latent_shape": [4, 32, 32],
        "data.num_classes": 1000,
        "precision": "bf16",
        "zero.stage": 2,
        "train.global_batch_size": 2048,
        "train.micro_batch_size": 32,
        "train.activation_checkpointing": True,
    }
    if "method.schedule_images" in configs.entries(base):
        settings["method.schedule_images"] = 1_000_000
    config = configs.changed(base, settings, "flow_maps")
    return estimate.estimate(config, 1, 8, _GPU).memory.total / 2**30
