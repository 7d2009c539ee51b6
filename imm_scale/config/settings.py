"""What is set where: the keys of YAML files and of key=value arguments, not yet read by their types."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import yaml

from imm_scale.config import keys, twice, values
from imm_scale.config.moved import renamed
from imm_scale.errors import UserError
from imm_scale.registry import load_plugins

_COMMAND_LINE = "command line"


class Setting(NamedTuple):
    """One key set somewhere.

    Attributes:
        value: as it was written: what `values.read` takes.
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
    def shown(self) -> str:
        """Where it stands and what, for messages."""
        return f"{self.origin}: {self.key}={values.shown(self.value)}"

    @property
    def origin(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


def setting_of(key: str, value: Any, source: str, line: int = 0) -> Setting:
    """A setting under the key's name of today."""
    new = renamed(key)
    return Setting(new, value, source, line, key if new != key else None)


def _settings_of_node(node: yaml.MappingNode, prefix: str, source: str) -> Iterator[Setting]:
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        if isinstance(value_node, yaml.MappingNode) and keys.is_section(key):
            yield from _settings_of_node(value_node, f"{key}.", source)
        else:
            yield setting_of(key, value_node, source, key_node.start_mark.line + 1)


def parse_yaml(text: str, source: str) -> list[Setting]:
    """The settings of one YAML mapping, in its order; plugins it names are imported first. Raises UserError."""
    try:
        node = yaml.compose(text, values.Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {error}") from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{source} must be a mapping of keys to values")
    twice.refuse(node, source)
    load_named_plugins([setting_of(key.value, value, source) for key, value in node.value if key.value == "plugins"])
    return list(_settings_of_node(node, "", source))


def read_yaml(path: str, seen: tuple[str, ...] = ()) -> Iterator[Setting]:
    """The settings of a file, after those of the files it includes. Raises UserError."""
    absolute = os.path.abspath(path)
    if absolute in seen:
        raise UserError(f"{path} includes itself, by way of {' -> '.join((*seen, absolute))}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"cannot read config {path!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no YAML: it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    settings = parse_yaml(text, path)
    for setting in settings:
        if setting.key == "include":
            for included in _includes(setting):
                yield from read_yaml(os.path.join(os.path.dirname(path), included), (*seen, absolute))
    yield from (setting for setting in settings if setting.key != "include")


def _includes(setting: Setting) -> list[str]:
    one = isinstance(setting.value, yaml.ScalarNode)
    value: Any = value_of(setting, str if one else list[str], "a file or a list of files")
    return [os.path.expanduser(path) for path in ([value] if one else value)]


def load_named_plugins(settings: Sequence[Setting]) -> None:
    """Imports what `plugins` names. Raises UserError."""
    for setting in settings:
        if setting.key == "plugins":
            load_plugins(value_of(setting, list[str], "list[str]"))


def parse_override(text: str) -> Setting:
    """The setting of a key=value argument."""
    key, _, value = text.partition("=")
    return setting_of(key.strip(), values.Word(value), _COMMAND_LINE)


def value_of(setting: Setting, hint: Any, expected: str, is_path: bool = False) -> Any:
    """What was written, as the type of its key reads it. Raises UserError."""
    try:
        return values.read(setting.value, hint, is_path)
    except yaml.YAMLError as error:
        raise UserError(f"{setting.shown} is not valid YAML: {error}") from error
    except ValueError as error:
        raise UserError(f"{setting.shown} does not fit {expected}: {error}") from error
