"""`imm-scale explain`: what keys mean, and where their values came from."""

from typing import Any

from imm_scale.choices import ANY_LENGTH
from imm_scale.config.keys import FREE_SECTION, Entry, check_key, entries, flatten, sections_of
from imm_scale.config.load import Loaded
from imm_scale.config.moved import renamed


def explain(key: str, loaded: Loaded) -> str:
    """What a key means, its type, default, current value and where that came from. A section explains all its keys."""
    key, known = renamed(key), entries(loaded.config)
    if key in sections_of(known):
        return "\n\n".join(explain(inner, loaded) for inner in known if inner.startswith(f"{key}."))
    check_key(key, "explain", known, loaded.config)
    if key.startswith(f"{FREE_SECTION}."):
        key = FREE_SECTION  # what is below it DeepSpeed's documentation explains
    entry = known[key]
    current = flatten(loaded.config)[key]
    origin = loaded.origins.get(key, "default")
    return (
        f"{key}\n  {entry.help}\n  type     {entry.type}\n{_range(entry)}  default  {_show(entry.default)}"
        f"\n  current  {_show(current)}  ({origin})"
    )


def overview(loaded: Loaded) -> str:
    """A line per key: current value and meaning."""
    values = flatten(loaded.config)
    return "\n".join(f"{key}={_show(values[key])}\n    {entry.help}" for key, entry in entries(loaded.config).items())


def _range(entry: Entry) -> str:
    """Lines on the numbers and the lists it takes; none where any will do."""
    lines = f"  range    {entry.range.text}\n" if entry.holds_numbers else ""
    return lines + (f"  length   {entry.length.text}\n" if entry.length != ANY_LENGTH else "")


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
