"""Distances of a model's samples to a reference, one file per evaluation, with all that is needed to get them again."""

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from imm_scale import storage
from imm_scale.checkpoint import export
from imm_scale.config.schema import Config, EvaluationConfig, SamplingConfig
from imm_scale.data.manifest import Manifest
from imm_scale.errors import UserError
from imm_scale.evaluation import extractors, measures, networks, reference
from imm_scale.evaluation.collect import Collector, Features
from imm_scale.evaluation.evaluators.base import Announce, Evaluator
from imm_scale.evaluation.metrics import Measure
from imm_scale.evaluation.records import FOLDER, SCHEMA_VERSION
from imm_scale.evaluation.reference import Reference
from imm_scale.methods.samplers import SAMPLES_PER_CALL
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World
from imm_scale.planner.flops import forward_multiply_adds, sampling_passes
from imm_scale.sampling import blocks
from imm_scale.sampling.draw import SamplingPlan, plan_of, sample, times_of
from imm_scale.sampling.source import Source


@dataclass(frozen=True)
class Distance:
    """The distance at one setting.

    Attributes:
        metric: name of the Frechet distance, `FID` only for the standard network.
        value, mean: over sampling seeds; std: over several seeds, None of one; error: of one evaluation, that std or
            the jackknife of the one seed there is.
        count: samples per seed (also `num`); times: the grid itself.
        numerical_error: bound of what fp64 rounding has done.
        sequence_passes: blocks of a sample, one after another; refinement_passes: calls of the network for each, mean
            over blocks; passes: their product, all calls one after another.
        multiply_adds: per sample, of the network and of its guide.
        flops_per_image: two per multiply-add.
        guide: what guidance leads away from, in words; None is the null label.
        block_steps: those of each block of a sample, where they have their own.
        measures: all metrics, {name: {value, error, values}}.
    """

    metric: str
    steps: int
    function_evaluations: int
    sampler: str
    grid: str
    times: tuple[float, ...]
    guidance_scale: float
    num: int
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    std: float | None
    value: float
    error: float
    error_kind: str
    count: int
    numerical_error: float
    sequence_passes: int
    refinement_passes: float
    passes: int
    multiply_adds: int
    flops_per_image: int
    seconds: float
    measures: dict[str, dict[str, Any]]
    precision: str
    compile: bool
    guide: str | None = None
    block_steps: str | None = None


def check_reference(config: Config) -> None:
    """Raises UserError where there is nothing to compare with, or an entry of a reference that is not named."""
    if config.data.manifest is None and config.evaluation.reference is None:
        raise UserError(
            "there is nothing to compare with: set evaluation.reference (an .npz of --make-reference) or "
            "data.manifest (the training data)"
        )
    if config.evaluation.reference is None and config.evaluation.reference_entry is not None:
        entry = config.evaluation.reference_entry
        raise UserError(f"evaluation.reference_entry={entry} chooses from an evaluation.reference, and there is none")


class DistanceEvaluator(Evaluator):
    """Distances of samples to a reference, by one extractor.

    Args:
        source: where the weights come from; a run stands for its newest checkpoint.
        announce: is told each distance, in words, on rank 0.
        folder: where files go that belong to no run; those of a run lie in its evaluations/.

    Raises:
        UserError: no committed checkpoint, or nothing to compare with.
    """

    def __init__(self, source: Source, config: Config, world: World, announce: Announce, folder: str = FOLDER):
        super().__init__(source, config, world, announce, folder)
        check_reference(config)
        self.extractor = networks.open_extractor(config.evaluation.extractor, self.device)
        measures.check(config.evaluation)

    @property
    def _wants_images(self) -> bool:
        return self.extractor.takes == "images"

    @cached_property
    def reference(self) -> Reference:
        """As given, or of the training data; the latter is kept in the run folder's references/."""
        evaluation = self.config.evaluation
        given = evaluation.reference is not None
        result = reference.open_reference(evaluation, self.extractor) if given else self._of_training_data()
        result.check(self.extractor, self.model.spec.space.image_shape if self.extractor.takes == "images" else None)
        return result

    def _of_training_data(self) -> Reference:
        url = self.config.data.manifest
        assert url is not None
        most, run_dir, spec = self.config.evaluation.compared, self.source.run_dir, self.model.spec
        key = [Manifest.load(url).hash, extractors.identity_hash(self.extractor.identity), self.config.seed, most]
        if self.extractor.takes == "images":
            key.append(self.config.sampling.vae_precision)
        name = hashlib.sha256(json.dumps([*key, spec.space.to_fields()]).encode()).hexdigest()[:12]
        cache_url = storage.join(run_dir, "references", f"{name}.npz") if run_dir is not None else None
        is_cached = cache_url is not None and self.world.is_main and storage.exists(cache_url)
        if cache_url is not None and distributed.all_sum(_flag(is_cached)):
            return Reference.load(cache_url)
        arguments = (self.config.seed, spec.space, self.model.decode)
        computed = reference.of_manifest(url, self.extractor, most, self.world, *arguments)
        if cache_url is not None and self.world.is_main:
            computed.save(cache_url)
        return computed

    def _settings(self, sampling: SamplingConfig, evaluation: EvaluationConfig, steps: int) -> dict[str, Any]:
        """What makes two evaluations the same, known before anything is loaded."""
        meta = self.checkpoint.meta if self.checkpoint else None
        guided = sampling.guide.is_set and sampling.guidance_scale != 1.0
        guide = self.model.guide if guided else None
        state = export.ema_state(self.checkpoint, sampling.ema) if self.checkpoint else None
        reference_url, manifest = evaluation.reference, self.config.data.manifest
        compared_with = Manifest.load(manifest).hash if reference_url is None and manifest is not None else None
        return {
            "schema_version": SCHEMA_VERSION,
            "step": self.source.step,
            "images_seen": meta.images_seen if meta else None,
            "objective": self.config.method.name if meta else self.model.spec.method.name,
            "ema": state,
            "training_data": meta.manifest_hash if meta else None,
            "source": None if meta else {"weights": self.model.weights_id},
            "reference_data": compared_with,
            "reference_file": None if reference_url is None else _identity(reference_url, evaluation.reference_entry),
            "extractor": extractors.describe(self.extractor),
            "seed": sampling.seed,
            "sampler": (self.config.method if meta else self.model.spec.method).sampler_named(sampling.sampler),
            "guidance_scale": sampling.guidance_scale,
            "guidance_interval": list(sampling.guidance_interval),
            "labels": sampling.labels,
            "grid": sampling.grid,
            "precision": sampling.precision,
            "compile": sampling.compile,
            "vae_precision": sampling.vae_precision if self.extractor.takes == "images" else None,
            "samples_per_call": SAMPLES_PER_CALL,
            "steps": steps,
            "repeats": evaluation.repeats,
            "num": evaluation.num,
            "metrics": list(evaluation.metrics),
            "compared": evaluation.compared,
            **({} if guide is None else {"guide": guide.weights_id}),
            **blocks.identity(sampling),
        }

    def _provenance(self) -> dict[str, Any]:
        """What else a reader needs in order to get the numbers again."""
        return {
            "reference": {"id": self.reference.id, "count": self.reference.count, **self.reference.source},
            "codec": self.model.spec.space.provenance,
            "rounding": "uint8, nearest" if self.extractor.takes == "images" else "none: latents are compared",
        }

    def _warnings(self, count: int) -> list[str]:
        messages = measures.warnings(count, len(self.reference.mean), self.reference)
        decoded = self.extractor.takes == "images" and "manifest" in self.reference.source
        if decoded and self.model.spec.space.needs_decoder:
            messages.append(
                "the reference is made of decoded latents, so the autoencoder's own error does not count: for numbers "
                "like published ones make a reference of the images themselves (--make-reference)"
            )
        messages += export.warnings(self.source.weights_url, self.config.sampling.ema)
        for line in messages:
            self._announce(f"warning: {line}")
        return messages

    # --- one step count ---

    def _result(self, sampling: SamplingConfig, evaluation: EvaluationConfig, steps: int) -> dict[str, Any]:
        began = time.perf_counter()
        measures.check_reference(evaluation.metrics, self.reference)
        num = evaluation.num or self.reference.count
        if num is None:
            raise UserError("the reference does not say how many images it is of: give --num (50,000 is the custom)")
        seeds = range(sampling.seed, sampling.seed + evaluation.repeats)
        plans = [plan_of(sampling, self.model.spec, steps, num, seed) for seed in seeds]
        by_seed = [self._measure(plan, evaluation) for plan in plans]
        times = times_of(self.model.spec, plans[0])
        return asdict(self._summarize(plans[0], times, seeds, by_seed, time.perf_counter() - began))

    def _measure(self, plan: SamplingPlan, evaluation: EvaluationConfig) -> dict[str, Measure]:
        features = self._features(plan, evaluation)
        return measures.measure(
            evaluation.metrics, features, self.reference, self.extractor, with_error=evaluation.repeats == 1
        )

    def _features(self, plan: SamplingPlan, evaluation: EvaluationConfig) -> Features:
        num_vectors = evaluation.compared if measures.compares_vectors(evaluation.metrics) else 0
        collector = Collector(plan.num, num_vectors)
        model, name = self.model, f"{plan.steps} steps, seed {plan.seed}"
        small = dataclasses.replace(plan, batch_size=SAMPLES_PER_CALL)  # all that is held at once
        for index, _, z in sample(model.net, model.spec, small, self.world, progress=name):
            collector.add(index, self.extractor(z if self.extractor.takes == "latents" else model.decode(z)))
        return collector.merge_ranks()

    def _summarize(
        self,
        plan: SamplingPlan,
        times: Tensor,
        seeds: Sequence[int],
        by_seed: Sequence[Mapping[str, Measure]],
        seconds: float,
    ) -> Distance:
        name = measures.named("frechet", self.extractor)
        summaries = {key: _summary([one[key] for one in by_seed]) for key in by_seed[0]}
        distance = summaries[name]
        guide, passes = self.model.guide_of(plan), plan.function_evaluations(times)
        multiply_adds = self._multiply_adds(plan, times)
        return Distance(
            metric=name,
            steps=plan.steps,
            function_evaluations=passes,
            sampler=plan.sampler,
            grid=plan.grid,
            times=tuple(times.tolist()),
            guidance_scale=plan.guidance_scale,
            num=plan.num,
            seeds=tuple(seeds),
            values=tuple(distance["values"]),
            mean=distance["value"],
            std=distance["error"] if len(seeds) > 1 else None,
            value=distance["value"],
            error=distance["error"],
            error_kind=f"standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "jackknife over samples",
            count=plan.num,
            numerical_error=max(one[name].numerical_error or 0.0 for one in by_seed),
            sequence_passes=plan.sequence_passes,
            refinement_passes=passes / plan.sequence_passes,
            passes=passes,
            multiply_adds=multiply_adds,
            flops_per_image=2 * multiply_adds,
            seconds=seconds,
            measures=summaries,
            precision=plan.precision,
            compile=plan.compile,
            guide=None if guide is None else guide.text,
            block_steps=self.config.sampling.block_steps,
        )

    def _multiply_adds(self, plan: SamplingPlan, times: Tensor) -> int:
        """Per sample, those of the guide by its own net."""
        guide, own = self.model.guide_of(plan), self.model.spec.net
        other, alone = own if guide is None else guide.spec.net, dataclasses.replace(plan, guidance_scale=1.0)
        of_own = alone.forwards(times, sampling_passes(own)) * forward_multiply_adds(own)
        return round(of_own + plan.guide_forwards(times, sampling_passes(other)) * forward_multiply_adds(other))


def _summary(by_seed: Sequence[Measure]) -> dict[str, Any]:
    """Mean over seeds; error of one evaluation: their standard deviation, or what the only one says of itself."""
    values = [one.value for one in by_seed]
    error = statistics.stdev(values) if len(values) > 1 else by_seed[0].error
    return {"value": statistics.fmean(values), "error": error, "values": values}


def _flag(here: bool) -> Tensor:
    return torch.tensor(int(here))


def _read(url: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError as error:
        raise UserError(
            f"the reference {url} does not exist: write it with imm-scale evaluate --make-reference"
        ) from error


def _identity(reference_url: str, entry: str | None) -> str:
    """Hash of a reference's file, with the name of the statistics that were chosen there."""
    sha256 = hashlib.sha256(_read(reference_url)).hexdigest()
    return sha256 if entry is None else f"{sha256} {entry}"
