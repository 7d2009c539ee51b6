"""What is compared, and under which protocol: tasks, heads, the sweep of each task, and its results.

A study of a task is one sweep: every head from every seed, on the same samples in the same order, with the same draws,
and measured by `imm-scale evaluate` on the same held-out samples, so that heads are compared sample by sample.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments import common
from imm_scale.evaluation.records import Values, read_values
from imm_scale.sweeps import definition, results
from imm_scale.sweeps.results import Outcome

CONFIGS = Path(__file__).parents[2] / "configs"
SEEDS = (0, 1, 2)
FLOORED = "factorized"  # the head that formula (1) is about


@dataclass(frozen=True)
class Row:
    """A head, as it is named on the page and in a config."""

    title: str
    settings: Mapping[str, Any]


def _head(kind: str, **more: Any) -> dict[str, Any]:
    return {"model.head.kind": kind, **{f"model.head.{key}": value for key, value in more.items()}}


def rows(components: int, one_pass: bool, depth: int = 1) -> dict[str, Row]:
    """The heads with so many components, or blocks of their own; `one_pass`: with the uniform-conditioned one."""
    found = {
        FLOORED: Row("factorized", _head(FLOORED)),
        "mixture": Row(f"mixture, R = {components}", _head("mixture", components=components)),
        "chain": Row(f"chain, R = {components}", _head("chain", components=components)),
        "autoregressive": Row("autoregressive", _head("autoregressive", depth=depth)),
    }
    if one_pass:
        found["uniform_conditioned"] = Row("uniform-conditioned", _head("uniform_conditioned", depth=depth))
    return found


_SHARED = {
    "data.space.name": "tokens",
    "model.name": "token_transformer",
    "model.depth": 2,
    "model.heads": 4,
    "model.qk_norm": True,
    "train.log_every": 50,
    "train.keep_last": 1,
    "optimizer.betas": [0.9, 0.99],
    "optimizer.schedule": "cosine",
    "ema.decays": [0.98],
    "zero.stage": 0,
    "wandb.mode": "disabled",
    "sampling.num": 16,
}


def _lasting(steps: int, batch: int) -> dict[str, Any]:
    """Keys of a training of so many steps: a tenth of it warming up."""
    return {
        "train.global_batch_size": batch,
        "train.micro_batch_size": batch,
        "train.max_steps": steps,
        "train.checkpoint_every": steps,
        "optimizer.warmup_images": steps * batch // 10,
    }


def _masked(steps: Sequence[int]) -> dict[str, Any]:
    """Keys of a net that is trained for a sampler of these steps, and measured in them."""
    return {
        "method.name": "masked",
        "method.steps": list(steps),
        "model.positions": "both",
        "evaluation.steps": list(steps),
        "sampling.steps": [steps[-1]],
    }


@dataclass(frozen=True)
class Task:
    """A data set, and what is trained on it.

    Attributes:
        steps: passes of the sampler that are measured; one entry for a causal net, blocks of a sequence.
        settings: config keys beside those that name the data.
        before: config keys, laid over these, of a net with the product head that all heads of a seed start from; {}
            starts them from nothing.
    """

    name: str
    title: str
    steps: tuple[int, ...]
    rows: Mapping[str, Row]
    settings: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)


TASKS = {
    task.name: task
    for task in (
        Task(
            "hands",
            "four poker hands, T = 2, K = 4",
            (1, 2),
            {**rows(8, one_pass=True), "mixture_4": Row("mixture, R = 4", _head("mixture", components=4))},
            {**_masked((1, 2)), **_lasting(1500, 32), "model.width": 32, "optimizer.lr": 2.0e-3},
        ),
        Task(
            "digits",
            "1,797 black and white digits, T = 64, K = 2",
            (1, 2, 4, 8, 16, 64),
            rows(16, one_pass=True, depth=2),
            {
                **_masked((1, 2, 4, 8, 16, 64)),
                "method.steps": [1, 2, 4, 8],
                **_lasting(1400, 32),
                "model.width": 64,
                "optimizer.lr": 2.0e-3,
                "evaluation.num": 449,
            },
            {
                **_lasting(1500, 32),
                "method.steps": [],
                "evaluation.steps": [1],
                "evaluation.num": 64,
            },
        ),
        Task(
            "kjv",
            "the next 4 letters of verses, T = 28, K = 27",
            (7,),
            rows(8, one_pass=False),
            {
                "method.name": "next_block",
                "model.causal": True,
                "model.block": 4,
                "model.width": 64,
                **_lasting(500, 32),
                "optimizer.lr": 2.0e-3,
                "evaluation.steps": [7],
                "evaluation.num": 500,
                "sampling.steps": [7],
                "sampling.sampler": "verified",
            },
        ),
        Task(
            "mnist",
            "5,000 black and white digits, T = 400, K = 2",
            (1, 2, 4, 8, 16, 32),
            {FLOORED: Row("factorized", _head(FLOORED))},
            {
                **_masked((1, 2, 4, 8, 16, 32)),
                "method.steps": [],  # formula (4): a product head needs no sampler in training
                **_lasting(2000, 16),
                "model.width": 64,
                "optimizer.lr": 2.0e-3,
                "evaluation.num": 400,
            },
        ),
    )
}


@dataclass(frozen=True)
class Study:
    """A task, below a folder.

    Attributes:
        data: config keys that name the data.
    """

    task: Task
    folder: Path
    data: Mapping[str, Any]
    seeds: tuple[int, ...] = SEEDS

    def run(self, at_once: int) -> None:
        """Trains and measures what is not there yet, so many runs side by side; goes on where it was stopped."""
        if self.task.before:
            product = {FLOORED: dict(self.task.rows[FLOORED].settings)}
            self._submit(self._before, product, self.task.before, self.seeds, at_once)
        heads = {name: dict(row.settings) for name, row in self.task.rows.items()}
        for name, seeds, settings in self._sweeps():
            self._submit(name, heads, settings, seeds, at_once)

    @property
    def _before(self) -> str:
        return f"{self.task.name}_before"

    def _sweeps(self) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
        """Names, seeds and settings: one sweep, or one a seed where each starts from a net of its own."""
        if not self.task.before:
            return [(self.task.name, self.seeds, {})]
        return [(f"{self.task.name}_{seed}", (seed,), self._starting(seed)) for seed in self.seeds]

    def _starting(self, seed: int) -> dict[str, Any]:
        run_dir = self.folder / self._before / "runs" / f"{FLOORED}-seed{seed}"
        return {"train.init_from": str(run_dir), "train.init_allow_change": ["model.head", "method"]}

    def _submit(
        self,
        name: str,
        variants: Mapping[str, Any],
        settings: Mapping[str, Any],
        seeds: Sequence[int],
        at_once: int,
    ) -> None:
        document = {
            "name": name,
            "description": f"Heads on {self.task.title}.",
            "folder": str(self.folder / name),
            "configs": [str(CONFIGS / "base.yaml")],
            "settings": {**_SHARED, **self.task.settings, **self.data, **settings},
            "variants": dict(variants),
            "seeds": list(seeds),
        }
        common.sweep(self.folder / f"{name}.yaml", document, at_once)

    # --- results ---

    @cached_property
    def outcomes(self) -> dict[tuple[str, int], Outcome]:
        """{(head, seed): its run}."""
        sweeps = [definition.load(str(self.folder / name)) for name, _, _ in self._sweeps()]
        found = [one for sweep in sweeps for one in results.outcomes(sweep)]
        return {(one.cell.factors["variant"], one.cell.factors["seed"]): one for one in found}

    @cached_property
    def _measured(self) -> dict[tuple[str, int], list[tuple[dict[str, Any], Values]]]:
        return {
            key: read_values(one.cell.run_dir, one.cell.config.train.max_steps) for key, one in self.outcomes.items()
        }

    def result(self, row: str, seed: int, steps: int) -> dict[str, Any]:
        """The evaluation of a head in so many steps."""
        return next(result for result, _ in self._measured[row, seed] if result["steps"] == steps)

    def values(self, row: str, seed: int, steps: int, name: str = "nll") -> NDArray[np.float64]:
        """What each held-out sample contributed: nats a sequence (N,), of causal nets by block or token (N, ...)."""
        return next(kept for result, kept in self._measured[row, seed] if result["steps"] == steps)[name]

    def measure(self, row: str, seed: int, steps: int, name: str) -> tuple[float, float | None]:
        """A further number of the evaluation, and its standard error."""
        one = self.result(row, seed, steps)["measures"][name]
        return one["value"], one["error"]

    @property
    def minutes(self) -> float:
        """Of training and measuring, without starts."""
        outcomes = list(self.outcomes.values())
        if self.task.before:
            outcomes += results.outcomes(definition.load(str(self.folder / self._before)))
        return common.minutes([one.cell.run_dir for one in outcomes])


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return statistics.fmean(values), common.deviation(values)


def paired(worse: NDArray[np.float64], better: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of worse - better over the same N samples, and its standard error; both (N,)."""
    gap = worse - better
    return float(gap.mean()), float(gap.std(ddof=1) / len(gap) ** 0.5)
