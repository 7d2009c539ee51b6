"""What every evaluation of weights is: settings that name its file, numbers for each step count, a record of both."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch

from imm_scale import storage
from imm_scale.checkpoint import run_folder
from imm_scale.checkpoint.format import Checkpoint
from imm_scale.config.schema import Config, EvaluationConfig, SamplingConfig
from imm_scale.evaluation.records import (
    FOLDER,
    Values,
    arithmetic,
    error_of,
    evaluation_url,
    guidance,
    read_document,
    samples,
    with_error,
    write_values,
)
from imm_scale.parallel import world as distributed
from imm_scale.parallel.world import World
from imm_scale.sampling.job import Model
from imm_scale.sampling.source import Source

Announce = Callable[[str], None]


class Evaluator(ABC):
    """One checkpoint (or export), measured at any number of settings by one loaded model.

    Args:
        source: where the weights come from; a run stands for its newest checkpoint.
        announce: is told each result, in words, on rank 0.
        folder: where files go that belong to no run; those of a run lie in its evaluations/.

    Raises:
        UserError: no committed checkpoint.
    """

    def __init__(self, source: Source, config: Config, world: World, announce: Announce, folder: str = FOLDER):
        self.folder = folder if source.run_dir is None else storage.join(source.run_dir, FOLDER)
        self.source, self.config, self.world = source.at_newest(), config, world
        self._announce = announce if world.is_main else lambda line: None
        self._values: Values = {}  # what each held-out sample contributed to the last result, where there is such
        self.device = distributed.device(world)

    @cached_property
    def model(self) -> Model:
        """The weights, read at the first use."""
        return Model.load(self.source, self.config.sampling, self.device, decoding=self._wants_images)

    @property
    def _wants_images(self) -> bool:
        return False

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint that is measured; None for exports."""
        return Checkpoint(self.source.weights_url) if self.source.step is not None else None

    def evaluate(self, sampling: SamplingConfig, evaluation: EvaluationConfig) -> dict[str, Any]:
        """Measures every step count of `evaluation.steps` and writes a file for each, unless it is there already.

        Returns:
            What stands in the files, their `results` in one list.
        """
        each = [self._evaluate(sampling, evaluation, steps) for steps in evaluation.steps]
        return {**each[0], "results": [result for one in each for result in one["results"]]}

    def _evaluate(self, sampling: SamplingConfig, evaluation: EvaluationConfig, steps: int) -> dict[str, Any]:
        settings = self._settings(sampling, evaluation, steps)
        url = distributed.from_main(lambda: self._url(settings), self.world)
        if distributed.all_sum(torch.tensor(int(self.world.is_main and storage.exists(url)))):
            document = read_document(url)
            for result in document["results"]:
                self._announce(describe(result))
            return document
        began = time.perf_counter()
        result = self._result(sampling, evaluation, steps)
        self._announce(describe(result))
        written = {
            **settings,
            "run": self.config.run.name,
            "checkpoint": self._committed,
            "weights": self.model.weights_id,
            **self._provenance(),
            "device": self.device.type,
            "ranks": self.world.size,
            "versions": run_folder.versions(),
            "results": [result],
            "warnings": self._warnings(result["count"]),
            "seconds": time.perf_counter() - began,
        }
        if self.world.is_main:
            if self._values:
                write_values(url, self._values)
            storage.write_text(url, json.dumps(written, indent=1))
        return written

    def _url(self, settings: dict[str, Any]) -> str:
        """Where the evaluation lies: beside one of another checkpoint of this step, should the run have begun anew."""
        url, checkpoint = evaluation_url(self.folder, self.source.step, settings), self._committed
        if storage.exists(url) and read_document(url).get("checkpoint", checkpoint) != checkpoint:
            return evaluation_url(self.folder, self.source.step, {**settings, "checkpoint": checkpoint})
        return url

    @property
    def _committed(self) -> str | None:
        """What tells a checkpoint from another one of the same step; None for exports."""
        return self.checkpoint.digest if self.checkpoint else None

    @abstractmethod
    def _settings(self, sampling: SamplingConfig, evaluation: EvaluationConfig, steps: int) -> dict[str, Any]:
        """What makes two evaluations the same, known before anything is loaded."""

    @abstractmethod
    def _provenance(self) -> dict[str, Any]:
        """What else a reader needs in order to get the numbers again."""

    @abstractmethod
    def _warnings(self, count: int) -> list[str]:
        """What a reader of the numbers must know, also announced."""

    @abstractmethod
    def _result(self, sampling: SamplingConfig, evaluation: EvaluationConfig, steps: int) -> dict[str, Any]:
        """The entry of `results` for one step count."""


def describe(result: Mapping[str, Any]) -> str:
    """A result in words: a line for the distance, and one for each further metric."""
    steps = f"{result['steps']} step" + ("" if result["steps"] == 1 else "s")
    guided = "" if result["guidance_scale"] == 1.0 else f", guidance {guidance(result)}"
    computed = f", {arithmetic(result)}" if arithmetic(result) else ""
    lines = [
        f"{result['metric']}  {steps:>9}  {with_error(result['mean'], error_of(result))}"
        f"  ({samples(result)} samples{guided}{computed}){_cost(result)}"
    ]
    for name, one in result.get("measures", {}).items():
        if name != result["metric"]:
            error = error_of(one)
            lines.append(f"  {name}  {one['value']:.4g}" + ("" if error is None else f" +- {error:.2g}"))
    return "\n".join(lines)


def _cost(result: Mapping[str, Any]) -> str:
    """Passes along the sequence, how often each is refined, and the work of a sample; "" where a file does not say."""
    if result.get("multiply_adds") is None:
        return ""
    sequence, refinement = result["sequence_passes"], result["refinement_passes"]
    return f"  {sequence:.4g} x {refinement:.4g} passes, {result['multiply_adds']:.3g} multiply-adds"
