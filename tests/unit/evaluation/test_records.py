"""The evaluation files of a run."""

import itertools
import json

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
