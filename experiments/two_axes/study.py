"""What is compared, and under which protocol: IMM and flow matching on samples in several blocks, seed by seed.

A study of a data set is one sweep: both methods on nets of each number of blocks, from every seed, with the same
images in the same order, the same parameters but for what flow matching has no use for, and as many optimizer steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments import common
from imm_scale.report.axes import points
from imm_scale.report.axes.points import Column, Point, Variant
from imm_scale.sweeps import definition, results
from imm_scale.sweeps.results import Outcome

CONFIGS = Path(__file__).parents[2] / "configs"
SEEDS = (0, 1, 2)
STEPS = {"flow_matching": (1, 2, 4, 8, 20, 100), "imm": (1, 2, 4)}  # of each block
TITLES = {"flow_matching": "flow matching", "imm": "IMM"}
# Keys of IMM beside its recipe: times as they are, and a net that says x_s itself (docs/log.md: what else was tried).
_IMM = {"method.flow_map.time_scale": 1.0, "method.flow_map.parameterization": "identity"}


def variant(method: str, blocks: int) -> str:
    """Name of a method on samples in so many blocks, in the sweep and in the figures."""
    return f"{method}_{blocks}"


@dataclass(frozen=True)
class Part:
    """One sweep: a net, and the numbers of blocks it is trained with.

    Attributes:
        recipes: {method: file of configs/}.
        settings: config keys laid over them.
    """

    name: str
    recipes: Mapping[str, str]
    blocks: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS


@dataclass(frozen=True)
class DataSet:
    """Images or latents. What is trained on them comes part by part; the first is what the page compares."""

    name: str
    title: str
    parts: tuple[Part, ...]


_DIGITS = {"imm": "digits.yaml", "flow_matching": "digits_flow_matching.yaml"}
_MNIST = {"imm": "mnist_latents.yaml", "flow_matching": "mnist_latents_flow_matching.yaml"}


def _lasting(steps: int) -> dict[str, Any]:
    return {"train.max_steps": steps, "train.checkpoint_every": steps, "train.keep_last": 1}


_BRIEF = {
    **_lasting(1000),
    "train.global_batch_size": 64,
    "train.micro_batch_size": 64,
    "optimizer.warmup_images": 6400,
    "evaluation.repeats": 1,
    "sampling.num": 8,
    "zero.stage": 0,
}

DATA = {
    one.name: one
    for one in (
        DataSet(
            "mnist",
            "4 x 8 x 8 latents of 5,000 MNIST digits",
            (Part("mnist", _MNIST, (1, 2, 4), {**_lasting(3000), "evaluation.num": 2500, "zero.stage": 0}),),
        ),
        DataSet(
            "digits",
            "1,797 digits of 8 x 8 pixels",
            (
                Part("digits", _DIGITS, (1, 2, 4), _BRIEF),
                Part("digits_rows", _DIGITS, (1, 8), {**_BRIEF, **_lasting(500), "model.patch_size": 1}, SEEDS[:1]),
            ),
        ),
    )
}


@dataclass(frozen=True)
class Study:
    """One part of a data set's comparison, below a folder.

    Attributes:
        data: config keys that name the data.
    """

    part: Part
    folder: Path
    data: Mapping[str, Any]

    def run(self, at_once: int) -> None:
        """Trains and measures what is not there yet, so many runs side by side; goes on where it was stopped."""
        document = {
            "name": self.part.name,
            "description": "Blocks along the sequence and refinement steps within each.",
            "folder": str(self.folder / self.part.name),
            "configs": [str(CONFIGS / self.part.recipes["imm"])],
            "settings": {**self.part.settings, **self.data},
            "variants": {
                variant(method, blocks): {
                    "include": [str(CONFIGS / self.part.recipes[method])],
                    "model.blocks": blocks,
                    "evaluation.steps": list(STEPS[method]),
                    **(_IMM if method == "imm" else {}),
                }
                for method in STEPS
                for blocks in reversed(self.part.blocks)
            },
            "seeds": list(self.part.seeds),
        }
        common.sweep(self.folder / f"{self.part.name}.yaml", document, at_once)

    # --- results ---

    @cached_property
    def outcomes(self) -> dict[tuple[str, int, int], Outcome]:
        """{(method, blocks, seed): its run}."""
        found = results.outcomes(definition.load(str(self.folder / self.part.name)))
        by_name = {(one.cell.factors["variant"], one.cell.factors["seed"]): one for one in found}
        return {
            (method, blocks, seed): by_name[variant(method, blocks), seed]
            for method in STEPS
            for blocks in self.part.blocks
            for seed in self.part.seeds
        }

    def run_dir(self, method: str, blocks: int) -> str:
        """Of the first seed."""
        return self.outcomes[method, blocks, self.part.seeds[0]].cell.run_dir

    @cached_property
    def column(self) -> Column:
        """All runs, as `imm-scale report --axes` reads them."""
        (column,) = points.read([one.cell.run_dir for one in self.outcomes.values()])
        return column

    def variant(self, method: str, blocks: int) -> Variant:
        """The runs of a method on so many blocks, over seeds."""
        name = variant(method, blocks)
        return next(one for one in self.column.variants if one.name == f"{self.part.name}/{name}")

    def point(self, method: str, blocks: int, steps: int) -> Point:
        """What was measured with so many steps in every block."""
        return next(one for one in self.variant(method, blocks).points if one.refinement == steps)

    @property
    def minutes(self) -> float:
        """Of training and measuring, without starts."""
        return common.minutes([one.cell.run_dir for one in self.outcomes.values()])
