"""Distances of a run's samples to its training images, one file per evaluation."""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from imm_scale import distributed, storage, weights
from imm_scale.build import ModelSpec
from imm_scale.config import Config
from imm_scale.data import dataset
from imm_scale.distributed import World
from imm_scale.errors import UserError
from imm_scale.evaluation.features import LATENTS, Extractor
from imm_scale.evaluation.frechet import Moments, frechet_distance
from imm_scale.flow_map import FlowMap
from imm_scale.sampling.run import SamplingPlan, plan_of, sample, times_of
from imm_scale.training import metrics
from imm_scale.training.checkpoint import Checkpoint

SCHEMA_VERSION = 1
_FOLDER = "evaluations"


@dataclass(frozen=True)
class Distance:
    """The distance at one setting: mean and standard deviation over sampling seeds."""

    metric: str
    steps: int
    function_evaluations: int
    sampler: str
    grid: str
    guidance_scale: float
    num: int
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    std: float


def reference_moments(manifest_url: str, seed: int, sigma_data: float, extractor: Extractor) -> Moments:
    """Moments of the features of all training images."""
    moments: Moments | None = None
    for x, _ in dataset.read_all(manifest_url, seed=seed, sigma_data=sigma_data):
        features = extractor.features(x)
        moments = moments or Moments(features.shape[1])
        moments.add(features)
    assert moments is not None, "a manifest has at least one sample"
    return moments


def measure(
    flow_map: FlowMap, spec: ModelSpec, plan: SamplingPlan, reference: Moments, extractor: Extractor, world: World
) -> float:
    """The Frechet distance of one set of samples to the reference."""
    moments = Moments(len(reference.mean))
    for _, _, z in sample(flow_map, spec, plan, world, progress=f"{plan.steps} steps, seed {plan.seed}"):
        moments.add(extractor.features(z))
    return frechet_distance(moments.merge_ranks(), reference)


def _summarize(
    plan: SamplingPlan, times: Tensor, seeds: Sequence[int], values: Sequence[float], extractor: Extractor
) -> Distance:
    return Distance(
        metric=f"frechet_{extractor.name}",
        steps=plan.steps,
        function_evaluations=plan.function_evaluations(times),
        sampler=plan.sampler,
        grid=plan.grid,
        guidance_scale=plan.guidance_scale,
        num=plan.num,
        seeds=tuple(seeds),
        values=tuple(values),
        mean=statistics.fmean(values),
        std=statistics.stdev(values) if len(values) > 1 else 0.0,
    )


def evaluate(config: Config, world: World, announce: Callable[[str], None]) -> dict[str, Any]:
    """Measures the newest checkpoint of a run at every step count of `evaluation.steps` and writes the result.

    An evaluation with the same settings of the same checkpoint is not done again.

    Args:
        announce: is told each distance, in words, on rank 0.

    Returns:
        What stands in evaluations/step-NNNNNNNN-ID.json.
    """
    checkpoint = Checkpoint.latest(config.run_dir)
    if config.data.manifest is None:
        raise UserError("data.manifest is not set: the run's config names no training data to compare with")
    settings = _settings(config, checkpoint)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    url = storage.join(config.run_dir, _FOLDER, f"step-{checkpoint.meta.step:08d}-{key}.json")
    if storage.exists(url):
        found: dict[str, Any] = json.loads(storage.read_text(url))
        for result in found["results"] if world.is_main else ():
            announce(describe(result))
        return found
    began = time.perf_counter()
    spec, flow_map = weights.load_flow_map(config.run_dir, config.sampling.ema, checkpoint.meta.step)
    flow_map.to(distributed.device(world))
    results = []
    for distance in _distances(config, spec, flow_map, world):
        results.append(asdict(distance))
        if world.is_main:
            announce(describe(results[-1]))
    evaluation = {
        **settings,
        "schema_version": SCHEMA_VERSION,
        "run": config.run.name,
        "results": results,
        "seconds": time.perf_counter() - began,
        "versions": metrics.versions(),
    }
    if world.is_main:
        storage.write_text(url, json.dumps(evaluation, indent=1))
    return evaluation


def _settings(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """What makes two evaluations the same."""
    return {
        "step": checkpoint.meta.step,
        "images_seen": checkpoint.meta.images_seen,
        "objective": config.objective.name,
        "ema": weights.ema_state(checkpoint, config.sampling.ema),
        "reference": checkpoint.meta.manifest_hash,
        "extractor": LATENTS.name,
        "seed": config.sampling.seed,
        "sampler": config.sampling.sampler,
        "guidance_scale": config.sampling.guidance_scale,
        "guidance_interval": config.sampling.guidance_interval,
        "labels": config.sampling.labels,
        "grid": config.sampling.grid,
        "batch_size": config.sampling.batch_size,
        **asdict(config.evaluation),
    }


def _distances(config: Config, spec: ModelSpec, flow_map: FlowMap, world: World) -> Iterator[Distance]:
    sampling, evaluation = config.sampling, config.evaluation
    assert config.data.manifest is not None
    reference = reference_moments(config.data.manifest, config.seed, spec.sigma_data, LATENTS)
    seeds = range(sampling.seed, sampling.seed + evaluation.repeats)
    for steps in evaluation.steps:
        plans = [plan_of(sampling, spec, steps, evaluation.num or reference.count, seed) for seed in seeds]
        values = [measure(flow_map, spec, plan, reference, LATENTS, world) for plan in plans]
        yield _summarize(plans[0], times_of(flow_map, spec, plans[0]), seeds, values, LATENTS)


def describe(result: Mapping[str, Any]) -> str:
    """A distance as one line."""
    steps = f"{result['steps']} step" + ("" if result["steps"] == 1 else "s")
    return (
        f"{result['metric']}  {steps:>9}  {result['mean']:.4f} +- {result['std']:.4f}"
        f"  ({len(result['seeds'])} x {result['num']} samples)"
    )


def read_evaluations(run_dir: str) -> list[dict[str, Any]]:
    """All evaluations of a run, in order of steps."""
    folder = storage.join(run_dir, _FOLDER)
    names = [name for name in storage.list_names(folder) if name.endswith(".json")]
    return [json.loads(storage.read_text(storage.join(folder, name))) for name in names]
