"""What was written for a key, read by the key's type.

YAML guesses a type from how a word looks: `007`, `no`, `1_000` and `12:30:00` become numbers or truth. A key knows
what it holds, so text is kept as typed where a key holds text, and numbers are read as people write them.
"""

import os
import re
import types
import typing
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

import yaml

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_LARGEST = 2**63 - 1  # what tensors and other programs hold


class Word(str):
    """What a key=value argument of a command line gives, as it was typed."""


class Loader(yaml.SafeLoader):
    """YAML in which 1e6 is a number, as YAML 1.2 has it, where a key may hold anything."""


class Dumper(yaml.SafeDumper):
    """Quotes text that `Loader` would take for something else."""


for resolving in (Loader, Dumper):
    resolving.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789"
    )


def read(written: Any, hint: Any, is_path: bool = False) -> Any:
    """The value of a key.

    Args:
        written: a node of a YAML file, a `Word`, or a value from Python.
        hint: the key's type.
        is_path: whether a leading ~ stands for a home (`expanded`), so that ~ alone is not YAML's null.

    Raises:
        ValueError: it does not fit; the message says why, and what would.
        yaml.YAMLError: a word that is not YAML, where the key holds a list or a mapping.
    """
    if isinstance(written, Word):
        return _of_word(written, hint, is_path)
    return _of_node(written, hint) if isinstance(written, yaml.Node) else _of_value(written, hint)


def shown(written: Any) -> str:
    """As it was written, for messages."""
    if isinstance(written, yaml.ScalarNode):
        return str(written.value)
    return yaml.serialize(written).strip() if isinstance(written, yaml.Node) else str(written)


def anything(node: yaml.Node) -> Any:
    """A node as YAML itself takes it. Raises yaml.YAMLError."""
    return Loader("").construct_object(node, deep=True)


def _of_word(word: str, hint: Any, is_path: bool) -> Any:
    inner, optional = _without_null(hint)
    if not _is_text(inner):
        return _of_node(yaml.compose(word, Loader) or yaml.ScalarNode("tag:yaml.org,2002:null", ""), hint)
    if optional and word in _NULLS and not (is_path and word == "~"):
        return None
    return _unquoted(word)


def _unquoted(word: str) -> str:
    """Without the quotes that YAML would take off, where the whole word stands in them."""
    if len(word) < 2 or word[0] != word[-1] or word[0] not in "'\"":
        return str(word)
    try:
        node = yaml.compose(word, Loader)
    except yaml.YAMLError:
        return str(word)
    return node.value if isinstance(node, yaml.ScalarNode) else str(word)


def _of_node(node: yaml.Node, hint: Any) -> Any:
    inner, optional = _without_null(hint)
    if isinstance(node, yaml.ScalarNode):
        if optional and node.style is None and node.value in _NULLS:
            return None
        return node.value if _is_text(inner) else _of_text(node.value, inner, lambda: anything(node))
    if typing.get_origin(inner) is list and isinstance(node, yaml.SequenceNode):
        return [_of_node(item, typing.get_args(inner)[0]) for item in node.value]
    if _is_text(inner) or inner in (int, float, bool):
        raise ValueError("one value belongs there, neither a list nor a mapping")
    return anything(node)


def _of_text(text: str, inner: Any, otherwise: Callable[[], Any]) -> Any:
    """A scalar for a key that holds no text."""
    if "${" in text:
        return text  # OmegaConf's to resolve
    if inner is int:
        return whole_number(text)
    if inner is float:
        return number(text)
    if inner is bool:
        return _truth(text)
    if typing.get_origin(inner) is list:
        raise ValueError(f"it holds a list: write [{text}]")
    return otherwise()


def _of_value(value: Any, hint: Any) -> Any:
    """A value from Python, or from a file that was read without knowing the key."""
    inner, _ = _without_null(hint)
    if value is None or (isinstance(value, str) and "${" in value):
        return value
    if _is_text(inner) and not isinstance(value, str):
        raise ValueError("it holds text: put the value in quotes, so that it stays as typed")
    if inner is int and isinstance(value, float | str):
        return whole_number(str(value))
    if inner is float and isinstance(value, str):
        return number(value)
    if inner in (int, float) and isinstance(value, bool):
        raise ValueError("it holds a number")
    if inner is bool and not isinstance(value, bool):
        return _truth(str(value))
    if typing.get_origin(inner) is list and isinstance(value, list | tuple):
        return [_of_value(item, typing.get_args(inner)[0]) for item in value]
    return value


# --- kinds of values ---


def whole_number(text: str) -> int:
    """An integer as people write it: 1000000, 1_000_000, 1e6, 0x10; 007 is 7. Raises ValueError."""
    try:
        exact = Decimal(int(text, 16) if re.fullmatch(r"[-+]?0[xX][0-9a-fA-F]{1,16}", text) else text)
    except InvalidOperation:
        exact = Decimal("nan")
    if not exact.is_finite() or exact.adjusted() > 18 or abs(exact) > _LARGEST or exact % 1:
        raise ValueError(f"it is no whole number of at most {_LARGEST}, such as 1000000, 1_000_000 or 1e6")
    return int(exact)


def number(text: str) -> float:
    """A number as people or YAML write it. Raises ValueError."""
    try:
        return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text, flags=re.IGNORECASE))
    except ValueError as error:
        raise ValueError("it is no number, such as 0.001 or 1e-3") from error


def _truth(text: str) -> bool:
    if text.lower() not in _BOOLS:
        raise ValueError("it is neither true nor false")
    return _BOOLS[text.lower()]


def expanded(path: str) -> str:
    """With the home that a leading ~ stands for. Raises ValueError."""
    resolved = os.path.expanduser(path)
    if resolved.startswith("~"):
        raise ValueError(f"{resolved.partition('/')[0]} is no user's home here; a folder of that name is ./{path}")
    return resolved


def _without_null(hint: Any) -> tuple[Any, bool]:
    """(T, True) of T | None, else (the hint, False)."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    if type(None) not in parts:
        return hint, False
    inner = [part for part in parts if part is not type(None)]
    return (inner[0] if len(inner) == 1 else Any), True


def _is_text(inner: Any) -> bool:
    return inner is str or typing.get_origin(inner) is Literal
