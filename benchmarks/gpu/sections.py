"""The sections of `make gpu`, in the order they run: proofs first, then timings in order of worth."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.report import Context, Report


@dataclass(frozen=True)
class Section:
    """A module of this package with a function `run(context, report)`.

    Attributes:
        limit: seconds it may take at full size on one H100; over all sections at most 480.
    """

    name: str
    limit: int
    what: str

    def load(self) -> Callable[[Context, Report], None]:
        return importlib.import_module(f"benchmarks.gpu.{self.name}").run


SECTIONS: tuple[Section, ...] = ()
