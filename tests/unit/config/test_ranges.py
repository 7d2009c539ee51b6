"""Each number has its range in the schema: beyond an edge it is refused by name, at the edge it is taken."""

import json
import math
from functools import cache
from typing import Any

import pytest

from imm_scale import config as configs
from imm_scale.choices import ANY_NUMBER, Interval
from imm_scale.config import checks
from imm_scale.config.keys import UNIONS, Entry
from imm_scale.errors import UserError

# Any finite number is meant: ends and means of a network's input, of latents, and of the logits of times.
WITHOUT_BOUND = {"evaluation.extractor.range", "evaluation.extractor.mean", "data.space.mean"}
WITHOUT_BOUND |= {"method.times.t", "method.times.s", "method.times.equal_t", "method.gap", "method.s"}
WITHOUT_BOUND |= {"method.logit_normal"}


@cache
def _config(section: str | None, name: str | None) -> configs.Config:
    """The defaults with one class of a union chosen; not validated, for some choices want other values too."""
    if section is None:
        return configs.Config()
    chosen = {"name": name}
    for part in reversed(section.split(".")):
        chosen = {part: chosen}
    return configs.from_yaml(json.dumps(chosen))


def _keys() -> dict[str, tuple[str | None, str | None, Entry]]:
    """Every numeric key under whatever choices, with a choice under which it exists."""
    places: list[tuple[str | None, str | None]] = [(None, None)]
    places += [(section, name) for section, registry in UNIONS.items() for name in registry.names()]
    keys = {}
    for section, name in places:
        for key, entry in configs.entries(_config(section, name)).items():
            if entry.holds_numbers and (section is None or key.startswith(f"{section}.")):
                keys.setdefault(key if section is None else f"{key} of {name}", (section, name, entry))
    return keys


KEYS = _keys()


def _ends(entry: Entry, whole: bool) -> tuple[list[float], list[float]]:
    """(numbers at the ends, numbers just beyond them)."""
    inside, beyond = [], []
    for end, away in ((entry.range.low, -1), (entry.range.high, 1)):
        if not math.isfinite(end):
            continue
        is_closed = entry.range.text[0] == "[" if away < 0 else entry.range.text[-1] == "]"
        out = end + away if whole else math.nextafter(end, away * math.inf)
        into = end - away if whole else math.nextafter(end, -away * math.inf)
        inside.append(end if is_closed else into)
        beyond.append(out if is_closed else end)
    return inside, beyond


def _value(entry: Entry, number: float) -> Any:
    """What a key holds where one of its numbers is this."""
    whole = "int" in entry.type
    number = number if whole else float(number)
    if "list" not in entry.type:
        return number
    fits = 1 if whole else 0.5
    assert fits in entry.range
    return [number, *[fits] * (int(entry.length.low) - 1)]


@pytest.mark.parametrize("key", KEYS)
def test_each_number_is_held_to_its_range(key):
    section, name, entry = KEYS[key]
    assert entry.range != ANY_NUMBER or entry.key in WITHOUT_BOUND, "give it a range in the schema"
    whole = "int" in entry.type
    inside, beyond = _ends(entry, whole)
    for number in inside:
        assert checks.problem_of(_value(entry, number), entry) is None
    for number in [*beyond, *([] if whole else [math.nan, math.inf, -math.inf])]:
        value = _value(entry, number)
        with pytest.raises(UserError) as caught:
            configs.changed(_config(section, name), {entry.key: value}, "a test")
        said = str(caught.value)
        assert f"{entry.key}={value}" in said and entry.range.text in said


@pytest.mark.parametrize("key", [key for key, (_, _, entry) in KEYS.items() if "list" in entry.type])
def test_each_list_is_held_to_its_length(key):
    section, name, entry = KEYS[key]
    item = 1 if "int" in entry.type else 0.5
    for length in {int(entry.length.low) - 1, entry.length.high + 1} - {-1, math.inf}:
        with pytest.raises(UserError, match=rf"{entry.key}=\[.*must have"):
            configs.changed(_config(section, name), {entry.key: [item] * int(length)}, "a test")


@pytest.mark.parametrize("key", ["optimizer.lr", "train.max_steps", "optimizer.betas", "sampling.steps", "method.k"])
def test_explain_shows_the_range(key):
    entry = configs.entries(configs.Config())[key]
    text = configs.explain(key, configs.load())
    assert f"range    {entry.range.text}" in text
    assert ("length   " + entry.length.text in text) == ("list" in entry.type)
    assert "range" not in configs.explain("run.name", configs.load())


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [("[0, 1)", [0, 0.5, math.nextafter(1, 0)], [-1e-9, 1, math.nan, math.inf]), ("(0, inf)", [5e-324, 1e308, 10**400],
      [0, -0.0, math.inf, math.nan]),
     ("[0, 9223372036854775807]", [0, 2**63 - 1], [-1, 2**63]), ("(-inf, inf)", [-1e308], [-math.inf, math.nan])],
)  # fmt: skip
def test_intervals_are_read_as_people_write_them(text, inside, outside):
    assert [number in Interval(text) for number in [*inside, *outside]] == [True] * len(inside) + [False] * len(outside)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.patch_size=0"], "model.patch_size=0"),
        (["model.width=36", "model.heads=5"], "multiple of model.heads=5"),
        (["model.heads=7"], "multiple of model.heads=7"),
        (["model.width=4", "model.heads=1", "model.mlp_ratio=0.1"], "mlp_ratio=0.1"),
        (["model.size=DiT-M/2"], "DiT-S/2"),
        (["method.eta_min=3", "method.eta_max=2"], "method.eta_max"),
        (["data.holdout=1.5"], "data.holdout=1.5"),
        (["train.profile_steps=[3,2]"], "profile_steps"),
        (["train.profile_steps=[3]"], "profile_steps"),
        (["run.name="], "run.name"),
        (["run.name=.."], "run.name"),
        (["run.name=a/../b"], "run.name"),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(overrides, said):
    with pytest.raises(UserError) as caught:
        configs.load([], overrides)
    assert said in str(caught.value)


def test_a_patch_that_fits_no_other_size_is_left_to_the_data():
    """3 divides no latent of 32, and 27 of other data."""
    assert configs.load([], ["model.patch_size=3"]).config.model.patch_size == 3


@pytest.mark.parametrize("interval", ["[0.5,0.5]", "[0.8,0.1]", "[-0.1,1]", "[0,1.5]", "[0.5]", "[]", "[0,0.5,1]"])
def test_an_interval_of_guidance_that_is_empty_or_outside_is_refused(interval):
    with pytest.raises(UserError, match=r"sampling\.guidance_interval="):
        configs.load([], [f"sampling.guidance_interval={interval}"])


@pytest.mark.parametrize("scale", ["1.5", "0", "0.5"])
def test_guidance_of_a_net_that_always_sees_labels_is_refused(scale):
    for name in ("imm", "flow_matching"):
        overrides = [f"method.name={name}", "method.label_drop=0"]
        assert configs.load([], overrides).config.method.label_drop == 0
        with pytest.raises(UserError, match=r"sampling\.guidance_scale=.*method\.label_drop above 0"):
            configs.load([], [*overrides, f"sampling.guidance_scale={scale}"])
