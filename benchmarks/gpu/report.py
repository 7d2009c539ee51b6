"""What a section hands back: figures, checks and goals with their bounds, and what it skipped and why."""

import json
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
        slack: what the sections' limits are multiplied by.
    """

    size: Size
    device: torch.device
    out: Path
    slack: float = 1.0

    @property
    def small(self) -> bool:
        return self.size == "small"

    @property
    def method(self) -> Literal["fork", "spawn"]:
        """How a fresh process starts: CUDA allows no fork; without it a fork has all imports already."""
        return "fork" if self.small else "spawn"


@dataclass(frozen=True)
class Entry:
    """One line of a section.

    Attributes:
        kind: `figure` (measured), `check` (what is right: a miss fails the command), `goal` (how fast: a miss is
            recorded and nothing more) or `skipped`.
        bound: of a check or a goal, as words: "<= 1e-06".
        passed: of a check or a goal; None otherwise.
    """

    kind: Literal["figure", "check", "goal", "skipped"]
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
        self._add(Entry("check", name, value, unit, *_judge(value, at_most, at_least, equals)))

    def goal(
        self, name: str, value: float, *, at_most: float | None = None, at_least: float | None = None, unit: str = ""
    ) -> None:
        """Something measured beside the speed that is aimed at: exactly one of the two. A miss fails nothing."""
        self._add(Entry("goal", name, value, unit, *_judge(value, at_most, at_least, None)))

    def skip(self, name: str, why: str) -> None:
        """Something this machine cannot do."""
        self._add(Entry("skipped", name, why))

    @property
    def failed(self) -> list[Entry]:
        """Checks that were not kept."""
        return [entry for entry in self.entries if entry.kind == "check" and not entry.passed]

    @property
    def missed(self) -> list[Entry]:
        """Goals that were not reached."""
        return [entry for entry in self.entries if entry.kind == "goal" and not entry.passed]

    def _add(self, entry: Entry) -> None:
        self.entries.append(entry)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps([asdict(e) for e in self.entries], indent=1))
        os.replace(draft, self.path)


def _judge(value: Value, at_most: float | None, at_least: float | None, equals: Value) -> tuple[str, bool]:
    """A bound in words, exactly one of the three, and whether a value keeps it."""
    assert [at_most, at_least, equals].count(None) == 2, (at_most, at_least, equals)
    if equals is not None:
        return f"= {equals}", value == equals
    assert isinstance(value, float | int), value
    if at_least is not None:
        return f">= {at_least:g}", value >= at_least
    assert at_most is not None
    return f"<= {at_most:g}", value <= at_most
