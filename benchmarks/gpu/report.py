"""What a section hands back: figures, checks against bounds, and what it skipped and why."""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

Size = Literal["small", "full"]
Value = float | int | str | bool | None


@dataclass(frozen=True)
class Context:
    """What a section runs on.

    Attributes:
        size: `full` on a GPU; `small` runs the same code on whatever there is, with nets and counts cut down.
        device: the GPU, or the CPU at size `small`.
        out: the folder of this command, for files that sections leave.
    """

    size: Size
    device: torch.device
    out: Path

    @property
    def small(self) -> bool:
        return self.size == "small"


@dataclass(frozen=True)
class Entry:
    """One line of a section.

    Attributes:
        kind: `figure` (measured), `check` (measured and held to a bound) or `skipped`.
        bound: of a check, as words: "<= 1e-06".
        passed: of a check; None otherwise.
    """

    kind: Literal["figure", "check", "skipped"]
    name: str
    value: Value
    unit: str = ""
    bound: str = ""
    passed: bool | None = None


@dataclass
class Report:
    """Entries in the order they came. Written after each one, so that a section over its time limit leaves the rest."""

    path: Path
    entries: list[Entry] = field(default_factory=list)

    def figure(self, name: str, value: Value, unit: str = "") -> None:
        """Something measured that nothing is asked of."""
        self._add(Entry("figure", name, value, unit))

    def check(
        self,
        name: str,
        value: Value,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        equals: Value = None,
        unit: str = "",
    ) -> None:
        """Something measured that must keep a bound: exactly one of the three. Not a number keeps none."""
        assert [at_most, at_least, equals].count(None) == 2, name
        if equals is not None:
            bound, passed = f"= {equals}", value == equals
        else:
            assert isinstance(value, float | int), (name, value)
            low, high = (-math.inf, at_most) if at_least is None else (at_least, math.inf)
            assert low is not None and high is not None
            bound, passed = (f">= {at_least:g}" if at_most is None else f"<= {at_most:g}"), low <= value <= high
        self._add(Entry("check", name, value, unit, bound, passed))

    def skip(self, name: str, why: str) -> None:
        """Something this machine cannot do."""
        self._add(Entry("skipped", name, why))

    @property
    def failed(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.passed is False]

    def _add(self, entry: Entry) -> None:
        self.entries.append(entry)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps([asdict(e) for e in self.entries], indent=1))
        os.replace(draft, self.path)
