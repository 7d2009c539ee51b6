"""Keys that stand twice in one mapping of a YAML file, of which YAML takes the last one without a word."""

from typing import Any

import yaml

from imm_scale.errors import UserError

_MERGE = "<<"  # which brings in what other mappings hold, as often as one likes


def refuse(node: yaml.Node | None, source: str, prefix: str = "") -> None:
    """Raises UserError, with key and line, for a key that stands twice in a mapping, here or below.

    Args:
        source: the file, for messages.
        prefix: what the keys of this mapping lie under, as "train.".
    """
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            refuse(item, source, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines and name != _MERGE:
            raise UserError(
                f"{source}:{line}: {prefix}{name} stands here again, after line {lines[name]}: leave one of them out"
            )
        lines[name] = line
        refuse(value, source, f"{prefix}{name}.")


def load(text: str, source: str) -> Any:
    """What a YAML text says. Raises UserError as `refuse`, and yaml.YAMLError."""
    refuse(yaml.compose(text, yaml.SafeLoader), source)
    return yaml.safe_load(text)
