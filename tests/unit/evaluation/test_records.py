"""The evaluation files of a run."""

import itertools
import json
from pathlib import Path

import pytest

from imm_scale.errors import UserError
from imm_scale.evaluation.records import FOLDER, SCHEMA_VERSION, evaluation_url, read_evaluations


def test_they_come_in_order_of_training_and_of_sampling_steps(tmp_path):
    (tmp_path / FOLDER).mkdir()
    expected = list(itertools.product((5, 20, 100), (1, 2, 8, 20, 100)))
    for step, steps in expected:
        url = evaluation_url(str(tmp_path / FOLDER), step, {"steps": steps})  # named by a hash, so in no order
        with open(url, "w") as file:
            json.dump({"schema_version": SCHEMA_VERSION, "step": step, "results": [{"steps": steps}]}, file)
    evaluations = read_evaluations(str(tmp_path))
    assert [(e["step"], e["results"][0]["steps"]) for e in evaluations] == expected


@pytest.mark.parametrize("data", [b"", b'{"schema_version": 2, "res', b"[]", b"{}", b"\xff\xfe\0"])
def test_a_damaged_evaluation_is_named(data, tmp_path):
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "step-00000003-abc.json").write_bytes(data)
    with pytest.raises(UserError, match=r"step-00000003-abc\.json is no evaluation, or damaged: remove it"):
        read_evaluations(str(tmp_path))


FIXTURES = Path(__file__).parents[2] / "fixtures" / "version_1" / "run"
OF_TOKENS = {"extractor": {"kind": "tokens"}}


def test_older_files_are_read_as_if_they_stated_passes_and_work():
    """One step of the run of version 0.1, and two; its net has 70,144 multiply-adds a pass."""
    first, second = (one["results"][0] for one in read_evaluations(str(FIXTURES)))
    keys = ("sequence_passes", "refinement_passes", "passes", "multiply_adds")
    assert [first[key] for key in keys] == [1, 1, 1, 70_144]
    assert [second[key] for key in keys] == [1, 2, 2, 140_288]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"function_evaluations": 8, "sampler": "unmask", "flops_per_image": 80}, (1, 8, 8, None)),
        ({"function_evaluations": 16, "sampler": "blocks", "flops_per_image": 80}, (16, 1, 16, None)),
        ({"function_evaluations": 5.5, "sampler": "verified", "flops_per_image": 80}, (5.5, 1, 5.5, None)),
        ({}, (1, None, None, None)),
    ],
)
def test_older_files_of_tokens_state_the_passes_of_their_sampler(tmp_path, result, expected):
    """Their FLOPs were of whole passes, more than a net with kept keys runs, so the work is not known."""
    document = {"schema_version": SCHEMA_VERSION, "step": 1, **OF_TOKENS, "results": [{"steps": 1, **result}]}
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "step-00000001-a.json").write_text(json.dumps(document))
    (read,) = read_evaluations(str(tmp_path))[0]["results"]
    keys = ("sequence_passes", "refinement_passes", "passes", "multiply_adds")
    assert tuple(read[key] for key in keys) == expected
