"""The keys of a config: which there are, what they mean, and which one a mistyped key was meant to be."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_type_hints

from imm_scale.choices import ANY_LENGTH, ANY_NUMBER, Choice, Interval
from imm_scale.config.moved import renamed
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.registry import BACKBONES, METHODS, REGISTRIES, SPACES, Registry

FREE_SECTION = "zero.extra"  # its keys are DeepSpeed's
# Sections of which each registered class has its own.
UNIONS: dict[str, Registry] = {registry.section: registry for registry in (METHODS, BACKBONES, SPACES)}


@dataclass(frozen=True)
class Entry:
    """One field of the schema.

    Attributes:
        hint: its type as Python has it; `type` is what people read.
        range: of a number, or of each number of a list; length: of a list.
        is_path: whether a leading ~ stands for a home.
    """

    key: str
    type: str
    default: Any
    help: str
    hint: Any = str
    range: Interval = ANY_NUMBER
    length: Interval = ANY_LENGTH
    is_path: bool = False

    @property
    def holds_numbers(self) -> bool:
        """Whether the range says anything about it."""
        return _mentions(self.hint, (int, float))


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _mentions(hint: Any, kinds: tuple[type, ...]) -> bool:
    return hint in kinds or any(_mentions(inner, kinds) for inner in typing.get_args(hint))


_hints = cache(get_type_hints)  # which compiles each text anew


def _walk(config: Any, prefix: str) -> Iterator[Entry]:
    """Entries of a config object, which says which classes are chosen."""
    hints = _hints(config.__class__)
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{key}.")
        elif isinstance(config, Choice) and item.name == "name":
            if prefix:
                yield _name_entry(key, item.default)
        else:
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            hint, about = hints[item.name], item.metadata
            yield Entry(
                key, _type_name(hint), default, about["help"], hint, about["range"], about["length"], about["is_path"]
            )


def _name_entry(key: str, default: Any) -> Entry:
    """Of the key that chooses a class: with one line on each."""
    registry = REGISTRIES[key.rpartition(".")[0]]
    lines = [f"{name}: {(registry.get(name).__doc__ or '').strip().splitlines()[0]}" for name in registry.names()]
    return Entry(key, " | ".join(registry.names()), default, f"Which {registry.kind}. " + " ".join(lines))


def entries_of(section: Any) -> list[Entry]:
    """The keys of a registered class' config alone, without the section's name."""
    return list(_walk(section, ""))


def entries(config: Config) -> dict[str, Entry]:
    """All keys that a config with these choices has."""
    return {entry.key: entry for entry in _walk(config, "")}


def flatten(config: Any) -> dict[str, Any]:
    """{dotted key: value} of a config or of one of its sections."""

    def walk(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for item in dataclasses.fields(value):
            child = getattr(value, item.name)
            if dataclasses.is_dataclass(child):
                yield from walk(child, f"{prefix}{item.name}.")
            else:
                yield prefix + item.name, child

    return dict(walk(config, ""))


def sections_of(keys: Mapping[str, Any]) -> set[str]:
    """Every section that holds one of these keys, inner ones too."""
    sections = set()
    for key in keys:
        while "." in key:
            key = key.rpartition(".")[0]
            sections.add(key)
    return sections


def all_sections() -> frozenset[str]:
    """Sections under whatever choices; a section of one method stands beside those of all others."""
    chosen = [(section, registry.config(name)) for section, registry in UNIONS.items() for name in registry.names()]
    return _sections_under(tuple(chosen))


@cache  # each mapping of a file asks, and the answer changes only where a plugin adds a class
def _sections_under(chosen: tuple[tuple[str, type[Choice]], ...]) -> frozenset[str]:
    sections = sections_of(entries(Config()))
    for section, config in chosen:
        sections |= sections_of({entry.key: entry for entry in _walk(config(), f"{section}.")})
    return frozenset(sections)


def is_section(key: str) -> bool:
    """Whether a key names a section, under whatever choices, as it is now or was in version 0.1."""
    return renamed(key) in all_sections()


def is_known(key: str) -> bool:
    """Whether a key or a section of this name exists under any choices, as it is now or was in version 0.1."""
    new = renamed(key)
    return new in entries(Config()) or bool(owners(new)) or new in all_sections() or new.startswith(f"{FREE_SECTION}.")


def union_of(key: str) -> str | None:
    """The section with a choice that a key lies in."""
    return next((section for section in UNIONS if key.startswith(f"{section}.")), None)


def owners(key: str) -> list[str]:
    """Names of the classes of a union's registry that have a key."""
    section = union_of(key)
    if section is None:
        return []
    registry, leaf = UNIONS[section], key.removeprefix(f"{section}.")
    return [name for name in registry.names() if leaf in flatten(registry.config(name)())]


def nearest_key(key: str, known: Mapping[str, Any]) -> str:
    """ "did you mean X?" for a mistyped key, or a pointer to the list of keys."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    same_leaf = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    suggestion = next(iter(same_leaf + close), None)
    return f"did you mean {suggestion}?" if suggestion else "`imm-scale explain` lists all keys"


def check_key(key: str, origin: str, known: Mapping[str, Entry], config: Config) -> None:
    """Raises UserError for a key that a config with these choices does not have."""
    if key in known or key.startswith(f"{FREE_SECTION}."):
        return
    if key in sections_of(known):
        first = next(other for other in known if other.startswith(f"{key}.")).removeprefix(f"{key}.")
        raise UserError(f"{origin}: {key} is a section; give its keys, as in {key}.{first}=...")
    theirs = owners(key)
    if theirs:
        section = union_of(key)
        assert section is not None
        chosen = flatten(config)[f"{section}.name"]
        raise UserError(
            f"{origin}: {key} is a key of the {UNIONS[section].kind} {' and '.join(theirs)}, not of {chosen}: leave it "
            f"out, or set {section}.name={theirs[0]}"
        )
    raise UserError(f"{origin}: unknown key {key!r}; {nearest_key(key, known)}")
