"""What pack says at the end: the classes, the fewest and the most images, what is left out and why."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from data_tools.packing.shard_writer import Bad
from data_tools.sources import LeftOut
from data_tools.sources.names import is_number, printable

_SHOWN = 20  # classes of the table, half of them from its end
_EXAMPLES = 5


def table(class_names: Sequence[str], counts: Mapping[int, int]) -> list[str]:
    """A line per class, and which have the most, the fewest and no images."""
    lines = ["  class   images  name"]
    shown = range(len(class_names))
    for i in shown:
        if len(shown) <= _SHOWN or i < _SHOWN // 2 or i >= len(shown) - _SHOWN // 2:
            lines.append(f"  {i:5d} {counts.get(i, 0):8d}  {class_names[i]}")
        elif i == _SHOWN // 2:
            lines.append(f"    ... {len(shown) - _SHOWN} more")
    filled = [i for i in shown if counts.get(i)]
    most, fewest = max(filled, key=lambda i: counts[i]), min(filled, key=lambda i: counts[i])
    lines.append(
        f"most images: {counts[most]} (class {most}, {class_names[most]}); fewest: {counts[fewest]} "
        f"(class {fewest}, {class_names[fewest]})"
    )
    empty = [i for i in shown if not counts.get(i)]
    if empty:
        listed = ", ".join(f"{i} ({class_names[i]})" for i in empty[:_EXAMPLES])
        lines.append(f"classes without images: {len(empty)}: {listed}{', ...' if len(empty) > _EXAMPLES else ''}")
    return lines + _odd_numbers(class_names)


def _odd_numbers(class_names: Sequence[str]) -> list[str]:
    """Classes named by numbers that are not their own, as folders 1 to 10 would be."""
    if not all(map(is_number, class_names)):
        return []
    odd = next((i for i, name in enumerate(class_names) if int(name) != i), None)
    if odd is None:
        return []
    return [f"the classes are named by numbers, but class {odd} is named {class_names[odd]}: --labels can number them"]


def alike(class_names: Sequence[str]) -> list[str]:
    """A note on classes whose names most people would take for one: cat and Cat, 7 and 07, two spellings of "é"."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(class_names):
        groups.setdefault(_reduced(name), []).append(i)
    pairs = [group for group in groups.values() if len(group) > 1]
    if not pairs:
        return []
    shown = "; ".join(" and ".join(f"{i} ({class_names[i]!r})" for i in group) for group in pairs[:_EXAMPLES])
    return [
        "names of classes differ in nothing but case, spaces, leading zeros or the encoding of accents, if at all: "
        f"{shown}{'; ...' if len(pairs) > _EXAMPLES else ''}"
    ]


def _reduced(name: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())
    return text.lstrip("0") or "0" if is_number(text) else text


def left_out(skipped: LeftOut, bad: Sequence[Bad], quarantine: str) -> list[str]:
    """A line per reason, with how many and an example."""
    lines = [
        f"  {count:8d}  {reason}, as {printable(example)}"
        for reason, (count, example) in sorted(skipped.reasons.items())
    ]
    reasons = Counter(one.reason.split(":")[0] for one in bad)
    for reason, count in reasons.most_common(_EXAMPLES):
        example = next(one for one in bad if one.reason.split(":")[0] == reason)
        lines.append(f"  {count:8d}  unreadable ({printable(example.reason)}), as {printable(example.name)}")
    if len(reasons) > _EXAMPLES:
        lines.append("            unreadable for other reasons")
    total = len(bad) + sum(count for count, _ in skipped.reasons.values())
    return [f"left out: {total}" + (f", {len(bad)} of them listed in {quarantine}" if bad else ""), *lines]
