"""Which results a report holds against each other, and how it shows what it knows of them."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from imm_scale.evaluation.records import FOLDER, SCHEMA_VERSION, conditions, read_evaluations
from imm_scale.report import comparison, distances

_METRIC = "frechet_latents"


def _evaluation(steps: int, value: float, **changes: Any) -> dict[str, Any]:
    """A file as `imm-scale evaluate` writes it; changes are of the file, or of its result where that has the key."""
    result = {
        "metric": _METRIC, "steps": steps, "function_evaluations": steps, "sampler": "pushforward", "grid": "uniform",
        "guidance_scale": 1.0, "num": 1797, "seeds": [0, 1, 2, 3, 4], "values": [value] * 5, "mean": value,
        "std": 0.003, "value": value, "error": 0.003, "precision": "fp32", "compile": False,
        "measures": {_METRIC: {"value": value, "error": 0.003, "values": [value] * 5}},
    }  # fmt: skip
    document = {
        "schema_version": SCHEMA_VERSION, "step": 1, "ema": "ema-0.995", "labels": "all", "warnings": [],
        "guidance_interval": [0.0, 1.0], "vae_precision": None, "versions": {}, "codec": {"kind": "pixels"},
        "extractor": {"name": "latents", "id": "e" * 64, "kind": "latents"},
        "reference": {"id": "a" * 64, "count": 1797, "manifest_hash": "d" * 64, "posterior_seed": 0},
        "results": [result],
    }  # fmt: skip
    for key, new in changes.items():
        (result if key in result else document)[key] = new
    return document


class _Run:
    """Evaluations as they come back from files."""

    name = "run"

    def __init__(self, folder: Path, evaluations: Sequence[dict[str, Any]]):
        (folder / FOLDER).mkdir(parents=True)
        for number, evaluation in enumerate(evaluations):
            (folder / FOLDER / f"step-00000001-{number:012x}.json").write_text(json.dumps(evaluation))
        self.evaluations = read_evaluations(str(folder))
        results = [(e, result) for e in self.evaluations for result in e["results"]]
        self.distances = [{**result, "method": "imm", "conditions": conditions(e, result)} for e, result in results]


def _printed(tmp_path: Path, few: list[dict[str, Any]], many: list[dict[str, Any]]) -> list[str]:
    ours, theirs = _Run(tmp_path / "imm", few), _Run(tmp_path / "flow_matching", many)
    pair = ours.distances, theirs.distances
    return [*distances.lines([ours, theirs]), *comparison.lines(*pair), *comparison.unlike(*pair)]


UNLIKE = [
    ("count", {"num": 90}, "count 1797 and 90"),
    ("repeats", {"seeds": [0], "values": [0.1]}, "repeats 5 and 1"),
    ("reference", {"reference": {"id": "b" * 64, "count": 1797}}, "reference training data"),
    ("other data", {"reference": {"id": "a" * 64, "count": 1797, "manifest_hash": "f" * 64}}, "reference"),
    ("feature network", {"extractor": {"name": "latents", "id": "f" * 64, "kind": "latents"}}, "feature network"),
    ("metric", {"metric": "frechet_pixels"}, "metric frechet_latents and frechet_pixels"),
    ("guidance", {"guidance_scale": 1.5}, "guidance 1 and 1.5"),
    ("labels", {"labels": "0-4"}, "labels all and 0-4"),
    ("precision", {"precision": "bf16"}, "precision fp32 and bf16"),
    ("compilation", {"compile": True}, "precision fp32 and fp32 compiled"),
]


@pytest.mark.parametrize(("changes", "said"), [case[1:] for case in UNLIKE], ids=[case[0] for case in UNLIKE])
def test_only_what_was_measured_alike_is_compared(tmp_path, changes, said):
    """The unlike result has the fewest steps, and the best value: it would win if it were taken."""
    many = [_evaluation(20, 0.01, **copy.deepcopy(changes)), _evaluation(40, 0.2)]
    printed = _printed(tmp_path / "with", [_evaluation(2, 0.1)], many)
    (line,) = [line for line in printed if "against" in line]
    assert line.startswith("IMM with 2 against flow matching with 40 steps: 0.1000 / 0.2000 = 0.50")
    assert "5 x 1797 samples" in line
    alone = _printed(tmp_path / "without", [_evaluation(2, 0.1)], many[:1])
    assert not [line for line in alone if "against" in line]
    (line,) = [line for line in alone if "no comparison" in line]
    assert said in line


@pytest.mark.parametrize("key", ["num", "seeds", "guidance_scale", "labels", "reference", "extractor"])
def test_what_a_file_does_not_say_is_shown_so_and_never_compared(tmp_path, key):
    """Both lack it: two unknowns are not alike."""
    few, many = _evaluation(2, 0.1), _evaluation(20, 0.2)
    for document in (few, many):
        (document["results"][0] if key in document["results"][0] else document).pop(key)
    printed = _printed(tmp_path, [few], [many])
    assert not [line for line in printed if "against" in line]
    assert "not recorded" in next(line for line in printed if "no comparison" in line)


def test_an_interval_of_guidance_counts_where_there_is_guidance(tmp_path):
    few = [_evaluation(2, 0.1), _evaluation(2, 0.1, guidance_scale=1.5)]
    other = {"guidance_interval": [0.2, 0.8]}
    many = [_evaluation(20, 0.2, **other), _evaluation(20, 0.4, guidance_scale=1.5, **other)]
    lines = [line for line in _printed(tmp_path, few, many) if "against" in line]
    assert [line.split("= ")[1].split()[0] for line in lines] == ["0.50"]


def test_ranks_and_seeds_that_change_no_reference_make_none_of_their_own(tmp_path):
    """Moments on two ranks differ by rounding, and pixels are stored as they are: no seed draws from them."""
    many = _evaluation(20, 0.2)
    many["reference"] |= {"id": "b" * 64, "posterior_seed": 7}
    assert [x for x in _printed(tmp_path / "pixels", [_evaluation(2, 0.1)], [many]) if "against" in x]
    few = _evaluation(2, 0.1, codec={"kind": "vae"})
    many["codec"] = {"kind": "vae"}  # whose posterior is drawn from with the seed
    assert not [x for x in _printed(tmp_path / "vae", [few], [many]) if "against" in x]


def test_the_best_grid_of_each_side_stands_for_it(tmp_path):
    few = [_evaluation(2, 0.3), _evaluation(2, 0.1, grid="edm")]
    many = [_evaluation(20, 0.4), _evaluation(20, 0.2, grid="edm")]
    (line,) = [line for line in _printed(tmp_path, few, many) if "against" in line]
    assert "0.1000 / 0.2000 = 0.50" in line


def test_the_table_says_which_grid(tmp_path):
    """Two results of a masked net differ in nothing else; of many step sizes the first are shown, in 24 characters."""
    sizes = ",".join(["1"] * 20)
    few = [_evaluation(2, 0.1), _evaluation(2, 0.2, grid="1,15"), _evaluation(20, 0.3, grid=sizes)]
    head, *rows = [line.split("  ") for line in distances.lines([_Run(tmp_path, few)])]
    place = [word.strip() for word in head if word].index("grid")
    shown = [[word.strip() for word in row if word][place] for row in rows]
    assert sorted(shown) == sorted(["uniform", "1,15", ",".join(["1"] * 12) + ",.."])


def test_errors_are_those_stored_or_none(tmp_path):
    jackknife = _evaluation(1, 0.5, seeds=[0], values=[0.5], std=0.0, error=0.0123)
    unknown = _evaluation(2, 0.4, seeds=[0], values=[0.4], std=0.0, error=float("nan"))
    tiny = _evaluation(4, 0.3, error=2e-6)
    printed = "\n".join(_printed(tmp_path, [jackknife, unknown, tiny], []))
    assert "0.5000 +- 0.0123" in printed
    assert "0.3000 +- 2e-06" in printed
    assert "0.0000" not in printed
    assert "nan" not in printed
    assert next(line for line in printed.splitlines() if "0.4000" in line).split()[3:5] == ["0.4000", "1"], (
        "no error beside the value"
    )


def test_one_seed_of_a_file_of_version_1_has_no_error(tmp_path):
    old = _evaluation(1, 0.5, schema_version=1, reference="d" * 64, extractor="latents")
    old["results"] = [
        {key: old["results"][0][key] for key in ("metric", "steps", "function_evaluations", "sampler", "grid")}
        | {"guidance_scale": 1.0, "num": 100, "seeds": [0], "values": [0.5], "mean": 0.5, "std": 0.0}
    ]
    printed = _printed(tmp_path, [old], [])
    assert "not recorded" in printed[1]
    assert "+-" not in printed[1]


def test_the_figure_draws_what_most_results_share_and_says_what_it_leaves_out(tmp_path):
    few = [_evaluation(steps, 0.1) for steps in (1, 2, 4)] + [_evaluation(1, 0.01, num=n) for n in (90, 91)]
    page = distances.section([_Run(tmp_path, few)])
    assert "count 1797, repeats 5" in page
    assert "2 results that were measured otherwise" in page
    assert "1 x 90" not in page
    assert "5 x 90" in page
