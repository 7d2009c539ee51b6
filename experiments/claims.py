"""What the pages say of expectations: a statement made before the runs, and what they measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """A statement that was made before the runs, whether it holds for every seed, and what was measured."""

    text: str
    holds: bool
    measured: str

    def __str__(self) -> str:
        return f"- {'**Holds**' if self.holds else '**Does not hold**'}: {self.text} {self.measured}"
