"""How YAML files and overrides become a `Config`.

Files merge from left to right, each after the files it names under `include:`; then come `key=value` overrides. A key
of a method (or backbone, or sample space) that another file's choice of `name` replaces goes with it.
"""

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from imm_scale import shipped
from imm_scale.config import keys, values
from imm_scale.config.checks import validate
from imm_scale.config.keys import Entry, check_key, entries, flatten
from imm_scale.config.schema import Config
from imm_scale.config.settings import (
    Setting,
    load_named_plugins,
    parse_override,
    parse_yaml,
    read_yaml,
    setting_of,
    value_of,
)
from imm_scale.errors import UserError

log = logging.getLogger("imm_scale")


@dataclass(frozen=True)
class Loaded:
    """A config and, for each key that was set, where: `file:line` or `command line`."""

    config: Config
    origins: dict[str, str]


# --- merging ---


def _nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _all_nested(settings: Sequence[Setting]) -> dict[str, Any]:
    """One mapping of all settings, later ones over earlier ones; mappings are merged, as OmegaConf does."""
    whole: dict[str, Any] = {}
    for setting in settings:
        _merge_into(whole, _nested(setting.key, setting.value))
    return whole


def _merge_into(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict):
            _merge_into(whole[key], value)
        else:
            whole[key] = dict(value) if isinstance(value, dict) else value


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


def _is_replaced(setting: Setting, later: Sequence[Setting], known: Mapping[str, Entry]) -> bool:
    """Whether a key went with the class it belongs to: another was chosen later, elsewhere; or the key stands in a file
    of version 0.1, where every key stood beside every method."""
    section = keys.union_of(setting.key)
    if section is None or setting.key in known or not keys.owners(setting.key):
        return False
    is_old = setting.old_key is not None and setting.line > 0  # a file; what is typed now is meant now
    return is_old or any(other.key == f"{section}.name" and other.source != setting.source for other in later)


def _apply(config: Config, settings: Sequence[Setting]) -> Config:
    """A config with other values under some keys; not validated. Raises UserError for what does not fit."""
    names = {s.key.removesuffix(".name"): s for s in settings if s.key.removesuffix(".name") in keys.UNIONS}
    for section, chosen in names.items():
        config = _choose(config, section, value_of(chosen, str, "a name"), chosen.origin)
    known = entries(config)
    used = [s for i, s in enumerate(settings) if not _is_replaced(s, settings[i + 1 :], known)]
    for setting in used:
        check_key(setting.key, setting.origin, known, config)
    _say_what_moved(settings)
    resolved: Config = _resolved(_merged(config, [_read(s, known) for s in used], known), used)
    _check_text(resolved, used)
    return _with_homes(resolved, known, used)


def _read(setting: Setting, known: Mapping[str, Entry]) -> Setting:
    """With its value as the key's type reads it."""
    entry = known.get(setting.key)
    if entry is None:
        return setting._replace(value=value_of(setting, Any, "a DeepSpeed setting"))
    value = value_of(setting, entry.hint, entry.type, entry.is_path)
    if any(text == "???" for text in _texts(value)):  # OmegaConf's word for a value that is missing
        raise UserError(f"{setting.shown}: ??? cannot stand as a value: give another")
    return setting._replace(value=value)


def _resolved(node: Any, settings: Sequence[Setting]) -> Any:
    """The config of a node, what stands in ${...} resolved. Raises UserError."""
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        where = [setting.shown for setting in settings if re.match(rf"{re.escape(setting.key)}(?![^.\[])", key)]
        shown = where[-1] if where else key
        raise UserError(f"{shown}: {_first_line(error)}. {_interpolation_remedy(shown)}") from error


def _interpolation_remedy(shown: str) -> str:
    names = re.findall(r"\$\{(\w+)\}", shown)
    variable = names[0] if names else "NAME"
    return f"${{KEY}} is the value of another key, ${{oc.env:{variable}}} that of an environment variable"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _check_text(config: Config, settings: Sequence[Setting]) -> None:
    """Raises UserError for text that would not be the same when the run folder's config.yaml is read."""
    for key, value in flatten(config).items():
        bad = next((text for text in _texts(value) if "${" in text or "\0" in text), None)
        if bad is not None:
            where = next((f"{s.origin}: " for s in reversed(settings) if s.key == key), "")
            raise UserError(f"{where}{key}={bad!r}: neither ${{ nor the character 0 can stand in a value: rename it")


def _with_homes(config: Config, known: Mapping[str, Entry], settings: Sequence[Setting]) -> Config:
    """With homes in place of ~ at the beginning of paths. Raises UserError for a home that is not there."""
    for key, value in flatten(config).items():
        if key in known and known[key].is_path and value is not None and value.startswith("~"):
            try:
                config = _with(config, key.split("."), values.expanded(value))
            except ValueError as error:
                shown = next((setting.shown for setting in reversed(settings) if setting.key == key), key)
                raise UserError(f"{shown}: {error}") from error
    return config


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in (*value, *value.values()):
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


@cache
def _defaults() -> Config:
    """One object, so that `_typed_node` knows it again."""
    return Config()


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
        return OmegaConf.merge(node, _all_nested(settings))  # in one piece: a merge per key takes ten times as long
    except OmegaConfBaseException:
        for setting in settings:  # once more, for the message
            node = _merge_one(node, setting, known)
        return node


def _merge_one(node: Any, setting: Setting, known: Mapping[str, Entry]) -> Any:
    try:
        return OmegaConf.merge(node, _nested(setting.key, setting.value))
    except OmegaConfBaseException as error:
        expected = known[setting.key].type if setting.key in known else "a DeepSpeed setting"
        raise UserError(
            f"{setting.origin}: {setting.key}={setting.value!r} does not fit {expected}: {_first_line(error)}"
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
    return _loaded([setting for path in files for setting in read_yaml(path)], overrides)


def load_text(text: str, source: str, overrides: Sequence[str] = ()) -> Loaded:
    """`load` of a YAML document at hand, which includes no other; `source` names it in messages. Raises UserError."""
    return _loaded(parse_yaml(text, source), overrides)


def unfinished(files: Sequence[str]) -> Config:
    """`load` of files alone, but not validated: for `changed` to lay over it what they leave open. Raises UserError."""
    settings = [setting for path in files for setting in read_yaml(path)]
    load_named_plugins(settings)
    return _apply(_defaults(), settings)


def _loaded(settings: list[Setting], overrides: Sequence[str]) -> Loaded:
    parsed = [parse_override(text) for text in overrides]
    load_named_plugins(parsed)
    settings = settings + parsed
    config = _apply(_defaults(), settings)
    validate(config)
    return Loaded(config, {setting.key: setting.origin for setting in settings})


def is_override(arg: str) -> bool:
    """Whether an argument is key=value: a path may hold = too, behind a slash."""
    key, equals, _ = arg.partition("=")
    return bool(equals) and "/" not in key


def _is_setting(arg: str) -> bool:
    """Whether an argument that ends as a config file does is key=value all the same, as in run.name=trial.yaml."""
    return is_override(arg) and keys.is_known(arg.partition("=")[0].strip())


def split_args(args: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(config files, key=value overrides, other arguments) of a command line. The name of a recipe is its file."""
    args = [shipped.find("recipe", arg) or arg for arg in args]
    files = [arg for arg in args if arg.endswith((".yaml", ".yml")) and not _is_setting(arg)]
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
    """{dotted key: what was written} of key=value words, for `changed`."""
    return {setting.key: setting.value for setting in map(parse_override, overrides)}


def changed(config: Config, settings: Mapping[str, Any], origin: str) -> Config:
    """A config with other values under some keys, validated; for many variants of one config much faster than `load`.

    Args:
        settings: {dotted key: value}.
        origin: where they stand, for messages.

    Raises:
        UserError: unknown key, wrong type or value.
    """
    new_config = _apply(config, [setting_of(key, value, origin) for key, value in settings.items()])
    try:
        validate(new_config)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    return new_config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load` reads back."""
    return yaml.dump(dataclasses.asdict(config), Dumper=values.Dumper, sort_keys=False)


def from_yaml(text: str, source: str = "config.yaml") -> Config:
    """The config a run folder was started with. Raises UserError for one that cannot be read, or holds nothing."""
    settings = parse_yaml(text, source)
    if not settings:
        raise UserError(f"{source} is empty, and so is no config of a run: restore it, or start the run again")
    return _apply(_defaults(), settings)
