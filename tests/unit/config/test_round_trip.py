"""A config as YAML and back is the same config, whatever its values are and whichever classes it chooses."""

import dataclasses
import typing
from typing import Any, Literal, get_type_hints

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from imm_scale import config as configs
from imm_scale.choices import Choice
from imm_scale.config import values
from imm_scale.config.keys import UNIONS
from imm_scale.config.schema import Config

# Any text a run can have: "${" and "???" are OmegaConf's, and no file name holds the character 0.
LIKE_OTHER_TYPES = [
    "007",
    "no",
    "null",
    "~",
    "1e3",
    "1_000",
    "12:30:00",
    "0x1f",
    ".inf",
    "",
    "a: b",
    "a #b",
    "'",
    "- a",
]
TEXT = st.one_of(
    st.sampled_from(LIKE_OTHER_TYPES),
    st.text(st.characters(exclude_characters="\0", categories=None), max_size=12),
    st.text("0123456789eE+-._:~#'\"{}[]$ \\\n", max_size=10),
).filter(lambda text: "${" not in text and text != "???")
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # a smaller example takes minutes to find, and says little more
NUMBERS = st.one_of(st.sampled_from([0.0, 1e-8, 1e300, 5e-324]), st.floats(allow_nan=False, allow_infinity=False))
PLAIN = st.one_of(TEXT, NUMBERS, st.integers(1 - 2**63, 2**63 - 1), st.booleans())


def _of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type of the schema."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(arguments)
    if typing.get_origin(hint) is list:
        return st.lists(_of(arguments[0]), max_size=3)
    if typing.get_origin(hint) is dict:
        return st.dictionaries(TEXT, st.one_of(PLAIN, st.lists(PLAIN, max_size=2)), max_size=3)
    if arguments:
        return st.one_of([st.none() if part is type(None) else _of(part) for part in arguments])
    return {str: TEXT, int: st.integers(1 - 2**63, 2**63 - 1), float: NUMBERS, bool: st.booleans(), Any: PLAIN}[hint]


def _config(cls: type) -> st.SearchStrategy[Any]:
    """Objects of a section's class, with any values under its keys."""
    fields = {}
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if issubclass(cls, Choice) and item.name == "name":
            continue
        fields[item.name] = _config(hint) if dataclasses.is_dataclass(hint) else _of(hint)
        if item.metadata.get("is_path"):  # a home stands there once a config is loaded
            fields[item.name] = fields[item.name].filter(lambda path: path is None or not path.startswith("~"))
    return st.builds(cls, **fields)


def _chosen() -> list[Any]:
    return [
        pytest.param(section, name, id=f"{section}={name}") for section in UNIONS for name in UNIONS[section].names()
    ]


@pytest.mark.parametrize(("section", "name"), _chosen())
@given(data=st.data())
@settings(max_examples=8, deadline=None, phases=PHASES)
def test_each_class_of_each_union_reads_back(section, name, data):
    chosen = data.draw(_config(UNIONS[section].config(name)))
    config = Config()
    path = section.split(".")
    config = _put(config, path, chosen)
    assert configs.from_yaml(configs.to_yaml(config)) == config


def _put(config: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _put(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: inner})


SECTIONS = [item.name for item in dataclasses.fields(Config) if item.name not in ("model", "method", "plugins")]


@pytest.mark.parametrize("name", SECTIONS)
@given(data=st.data())
@settings(max_examples=8, deadline=None, phases=PHASES)
def test_every_key_of_every_section_reads_back(name, data):
    hint = get_type_hints(Config)[name]
    if name == "data":  # its sample space is one of a union, above
        value = data.draw(_config(hint).map(lambda made: dataclasses.replace(made, space=Config().data.space)))
    else:
        value = data.draw(_config(hint) if dataclasses.is_dataclass(hint) else _of(hint))
    config = dataclasses.replace(Config(), **{name: value})
    assert configs.from_yaml(configs.to_yaml(config)) == config


@given(text=TEXT)
@settings(max_examples=60, deadline=None, phases=PHASES)
def test_a_word_of_the_command_line_is_text_as_typed(text):
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    assert quoted or values.read(values.Word(text), str) == text


@given(whole=st.integers(0, 2**53))
def test_a_whole_number_in_any_of_its_spellings(whole):
    for text in (str(whole), f"{whole:_}", f"{whole}.0", f"{whole}e0", f"+{whole}", hex(whole), f"000{whole}"):
        assert values.read(values.Word(text), int) == whole


@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_as_python_writes_it(number):
    assert values.read(values.Word(repr(number)), float) == number
