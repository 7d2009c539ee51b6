"""How YAML files and overrides become a `Config`.

Files merge from left to right, each after the files it names under `include:`; then come `key=value` overrides. A key
of a method (or backbone, or sample space) that another file's choice of `name` replaces goes with it.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from imm_scale import shipped
from imm_scale.config import keys
from imm_scale.config.checks import validate
from imm_scale.config.keys import Entry, check_key, entries, flatten
from imm_scale.config.moved import renamed
from imm_scale.config.schema import Config
from imm_scale.errors import UserError
from imm_scale.registry import load_plugins

log = logging.getLogger("imm_scale")

_COMMAND_LINE = "command line"


class Setting(NamedTuple):
    """One key set somewhere.

    Attributes:
        source: the file, or the command line.
        line: in the file; 0 on the command line.
        old_key: the key as it was written, where it has moved since.
    """

    key: str
    value: Any
    source: str
    line: int = 0
    old_key: str | None = None

    @property
    def origin(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Loaded:
    """A config and, for each key that was set, where: `file:line` or `command line`."""

    config: Config
    origins: dict[str, str]


# --- reading ---


def _setting(key: str, value: Any, source: str, line: int = 0) -> Setting:
    new = renamed(key)
    return Setting(new, value, source, line, key if new != key else None)


def _settings_of_node(loader: Any, node: yaml.MappingNode, prefix: str, source: str) -> Iterator[Setting]:
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        if isinstance(value_node, yaml.MappingNode) and keys.is_section(key):
            yield from _settings_of_node(loader, value_node, f"{key}.", source)
        else:
            line = key_node.start_mark.line + 1
            yield _setting(key, loader.construct_object(value_node, deep=True), source, line)


def _parse_yaml(text: str, source: str) -> list[Setting]:
    """The settings of one YAML mapping, in its order; plugins it names are imported first."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {error}") from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{source} must be a mapping of keys to values")
    for key_node, value_node in node.value:
        if key_node.value == "plugins":
            load_plugins(loader.construct_object(value_node, deep=True))
    return list(_settings_of_node(loader, node, "", source))


def _read_yaml(path: str, seen: tuple[str, ...] = ()) -> Iterator[Setting]:
    absolute = os.path.abspath(path)
    if absolute in seen:
        raise UserError(f"{path} includes itself, by way of {' -> '.join((*seen, absolute))}")
    try:
        with open(path) as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"cannot read config {path!r}: {error.strerror}") from error
    settings = _parse_yaml(text, path)
    for setting in settings:
        if setting.key == "include":
            for included in [setting.value] if isinstance(setting.value, str) else setting.value:
                yield from _read_yaml(os.path.join(os.path.dirname(path), included), (*seen, absolute))
    yield from (setting for setting in settings if setting.key != "include")


def _parse_override(text: str) -> Setting:
    key, _, value = text.partition("=")
    try:
        return _setting(key.strip(), yaml.safe_load(value), _COMMAND_LINE)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: the value is not valid YAML ({error})") from error


# --- merging ---


def _nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _with(config: Any, path: Sequence[str], value: Any) -> Any:
    """The config with another value at the end of the path."""
    first, *rest = path
    return dataclasses.replace(config, **{first: _with(getattr(config, first), rest, value) if rest else value})


def _choose(config: Config, section: str, name: Any, origin: str) -> Config:
    """The config with another class in a union's section; what is set there, and the new class has too, stays.

    Raises:
        UserError: an unknown name.
    """
    try:
        chosen = keys.UNIONS[section].config(str(name))()
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    path = section.split(".")
    old = reduce(getattr, path, config)
    if type(old) is type(chosen):
        return config
    known, defaults = flatten(chosen), flatten(type(old)())
    node = OmegaConf.structured(chosen)
    for key, value in flatten(old).items():
        if key != "name" and key in known and value != defaults[key]:
            node = OmegaConf.merge(node, _nested(key, value))
    return _with(config, path, OmegaConf.to_object(node))


def _is_replaced(setting: Setting, names: Mapping[str, Setting], known: Mapping[str, Entry]) -> bool:
    """Whether a key went with the class it belongs to: it is older than the choice of another, or of version 0.1, where
    every key stood beside every method."""
    section = keys.union_of(setting.key)
    if section is None or setting.key in known or not keys.owners(setting.key):
        return False
    name = names.get(section)
    return setting.old_key is not None or (name is not None and name.source != setting.source)


def _apply(config: Config, settings: Sequence[Setting]) -> Config:
    """A config with other values under some keys; not validated. Raises UserError for what does not fit."""
    names = {s.key.removesuffix(".name"): s for s in settings if s.key.removesuffix(".name") in keys.UNIONS}
    for section, chosen in names.items():
        config = _choose(config, section, chosen.value, chosen.origin)
    known = entries(config)
    used = [setting for setting in settings if not _is_replaced(setting, names, known)]
    for setting in used:
        check_key(setting.key, setting.origin, known, config)
    _say_what_moved(settings)
    resolved: Config = OmegaConf.to_object(_merged(config, used, known))  # type: ignore[assignment]
    return resolved


_typed: list[tuple[Config, Any]] = []  # the last config and its node: the variants of a sweep share their base


def _typed_node(config: Config) -> Any:
    """OmegaConf's node of a config, not to be changed; making it takes as long as merging into it."""
    if not _typed or _typed[0][0] is not config:
        _typed[:] = [(config, OmegaConf.structured(config))]
    return _typed[0][1]


def _merged(config: Config, settings: Sequence[Setting], known: Mapping[str, Entry]) -> Any:
    """The typed node of a config with settings merged in, at once where all of them fit."""
    node = _typed_node(config)
    try:
        return OmegaConf.merge(node, *(_nested(s.key, s.value) for s in settings))
    except OmegaConfBaseException:
        for setting in settings:  # once more, for the message
            node = _merge_one(node, setting, known)
        return node


def _merge_one(node: Any, setting: Setting, known: Mapping[str, Entry]) -> Any:
    try:
        return OmegaConf.merge(node, _nested(setting.key, setting.value))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        expected = known[setting.key].type if setting.key in known else "a DeepSpeed setting"
        raise UserError(
            f"{setting.origin}: {setting.key}={setting.value!r} does not fit {expected}: {reason}"
        ) from error


def _say_what_moved(settings: Sequence[Setting]) -> None:
    moved = [setting for setting in settings if setting.old_key is not None]
    if moved:
        first, more = moved[0], f", and {len(moved) - 1} keys like it" if len(moved) > 1 else ""
        log.warning("%s: %s is read as %s%s", first.origin, first.old_key, first.key, more)


def load(files: Sequence[str] = (), overrides: Sequence[str] = ()) -> Loaded:
    """Merges files from left to right, then overrides, over the defaults, and validates the result.

    Raises:
        UserError: unreadable file, a plugin that does not import, unknown key (with its file, line and nearest valid
            key), wrong type or value.
    """
    return _loaded([setting for path in files for setting in _read_yaml(path)], overrides)


def load_text(text: str, source: str, overrides: Sequence[str] = ()) -> Loaded:
    """`load` of a YAML document at hand, which includes no other; `source` names it in messages. Raises UserError."""
    return _loaded(_parse_yaml(text, source), overrides)


def _loaded(settings: list[Setting], overrides: Sequence[str]) -> Loaded:
    parsed = [_parse_override(text) for text in overrides]
    for setting in parsed:
        if setting.key == "plugins":
            load_plugins(setting.value)
    settings = settings + parsed
    config = _apply(Config(), settings)
    validate(config)
    return Loaded(config, {setting.key: setting.origin for setting in settings})


def is_override(arg: str) -> bool:
    """Whether an argument is key=value: a path may hold = too, behind a slash."""
    key, equals, _ = arg.partition("=")
    return bool(equals) and "/" not in key


def split_args(args: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(config files, key=value overrides, other arguments) of a command line. The name of a recipe is its file."""
    args = [shipped.find("recipe", arg) or arg for arg in args]
    files = [arg for arg in args if arg.endswith((".yaml", ".yml"))]
    overrides = [arg for arg in args if arg not in files and is_override(arg)]
    return files, overrides, [arg for arg in args if arg not in files and arg not in overrides]


def load_words(args: Sequence[str]) -> Loaded:
    """The config of `imm-scale train WORD...`. Raises UserError."""
    files, overrides, others = split_args(args)
    if others:
        recipes = shipped.known("recipe", others[0])
        raise UserError(
            f"{others[0]!r} is no config file (*.yaml), no override (key=value) and no shipped recipe: {recipes}"
        )
    return load(files, overrides)


def settings_of(overrides: Sequence[str]) -> dict[str, Any]:
    """{dotted key: value} of key=value words. Raises UserError for a value that is not YAML."""
    return {setting.key: setting.value for setting in map(_parse_override, overrides)}


def changed(config: Config, settings: Mapping[str, Any], origin: str) -> Config:
    """A config with other values under some keys, validated; for many variants of one config much faster than `load`.

    Args:
        settings: {dotted key: value}.
        origin: where they stand, for messages.

    Raises:
        UserError: unknown key, wrong type or value.
    """
    new_config = _apply(config, [_setting(key, value, origin) for key, value in settings.items()])
    try:
        validate(new_config)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    return new_config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def from_yaml(text: str, source: str = "config.yaml") -> Config:
    """The config a run folder was started with. Raises UserError for one that cannot be read."""
    return _apply(Config(), _parse_yaml(text, source))
