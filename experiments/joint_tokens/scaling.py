"""Sizes and budgets of nets for the next letter: a sweep of the house, whose law predicts what was held out of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from experiments import common
from experiments.joint_tokens.study import CONFIGS
from imm_scale.sweeps import definition, results, study


@dataclass(frozen=True)
class Scaling:
    """The sweep of configs/sweep/kjv_scaling.yaml, below a folder.

    Attributes:
        data: config keys that name the data.
        changes: axes of the sweep file laid over its own.
    """

    folder: Path
    data: Mapping[str, Any]
    changes: Mapping[str, Any]

    def run(self, at_once: int) -> None:
        """Trains and measures what is not there yet."""
        document = yaml.safe_load((CONFIGS / "sweep" / "kjv_scaling.yaml").read_text())
        document |= {**self.changes, "folder": str(self._place), "configs": [str(CONFIGS / "base.yaml")]}
        document["settings"] |= self.data
        common.sweep(self.folder / "kjv_scaling.yaml", document, at_once)

    @property
    def _place(self) -> Path:
        return self.folder / "kjv_scaling"

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A row a cell, as in results.parquet."""
        sweep = definition.load(str(self._place))
        return results.rows(sweep, results.outcomes(sweep))

    @cached_property
    def found(self) -> study.Study:
        """Laws and predictions."""
        return study.analyse(self.rows)

    @property
    def minutes(self) -> float:
        """Of training."""
        return sum(row["train_seconds"] or 0.0 for row in self.rows) / 60
