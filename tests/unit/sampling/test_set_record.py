"""Which name a set of samples gets: its own again, never one under which other samples stand."""

import json
import threading
import uuid
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imm_scale import storage
from imm_scale.errors import UserError
from imm_scale.evaluation import images
from imm_scale.sampling import set_record

SETTINGS = {"weights": "a" * 64, "seed": 0, "times": [1.0, 0.5], "labels": list(range(10)), "precision": "fp32"}


def _begin(folder: str, num: int = 64, shown: dict | None = None, **changed) -> str:
    return set_record.begin(folder, "steps-2", {**SETTINGS, **changed}, num, shown or {})


@pytest.mark.parametrize(
    ("changed", "shown", "name"),
    [
        ({"seed": 1}, {}, "steps-2-seed-1"),
        ({"weights": "b" * 64}, {"weights": "ema-0.99"}, "steps-2-ema-0.99"),
        ({"precision": "bf16", "seed": 7}, {}, "steps-2-seed-7-precision-bf16"),
        ({"labels": [3, 7]}, {"labels": "labels-3,7"}, "steps-2-labels-3_7"),
        ({"guidance_interval": [0.1, 0.9]}, {}, "steps-2-guidance_interval-"),
    ],
)
def test_other_samples_get_a_name_that_says_what_is_other(changed, shown, name, tmp_path):
    assert _begin(str(tmp_path)) == "steps-2"
    other = _begin(str(tmp_path), shown=shown, **changed)
    assert other.startswith(name)
    assert _begin(str(tmp_path), shown=shown, **changed) == other, "and the same name again"
    assert _begin(str(tmp_path)) == "steps-2"


def test_more_of_the_same_go_on_and_fewer_leave_them_as_they_are(tmp_path):
    assert _begin(str(tmp_path), num=1000) == "steps-2"
    assert _begin(str(tmp_path), num=64) == "steps-2-num-64"
    assert _begin(str(tmp_path), num=2000) == "steps-2"


def test_what_lies_there_without_a_record_is_left_alone(tmp_path):
    (tmp_path / "steps-2.npz").write_bytes(b"somebody's")
    name = _begin(str(tmp_path))
    assert name == f"steps-2-{set_record.identity(SETTINGS)[:8]}" == _begin(str(tmp_path))


@pytest.mark.parametrize("ours", [True, False])
def test_parts_of_a_stopped_job_of_an_older_version(ours, tmp_path):
    owner = set_record.identity(SETTINGS if ours else {**SETTINGS, "seed": 1})
    storage.write_text(f"{tmp_path}/steps-2.shards/samples-000000.json", json.dumps({"identity": owner}))
    assert (_begin(str(tmp_path)) == "steps-2") == ours


def test_of_two_jobs_at_once_one_gets_the_name():
    folder, names = f"memory://{uuid.uuid4().hex}", []
    threads = [threading.Thread(target=lambda s=seed: names.append(_begin(folder, seed=s))) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 8 and names.count("steps-2") == 1


_settings = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 3),
        "guidance_scale": st.floats(1.0, 3.0),
        "sampler": st.sampled_from(["heun", "restart"]),
        "labels": st.lists(st.integers(0, 9), min_size=1, max_size=12),
        "weights": st.sampled_from(["a" * 64, "b" * 64]),
    }
)


@hypothesis.settings(deadline=None)  # it writes files
@given(st.lists(st.tuples(_settings, st.integers(1, 3)), max_size=8))
def test_no_sequence_of_sets_ever_takes_a_name_of_others(sets):
    """Whatever is drawn after whatever, a name belongs to one identity for good, and its count never falls."""
    folder, owners = f"memory://{uuid.uuid4().hex}", {}
    for settings, num in sets:
        name = set_record.begin(folder, "steps-2", settings, num, {})
        identity, count = owners.setdefault(name, (set_record.identity(settings), num))
        assert identity == set_record.identity(settings) and count <= num
        owners[name] = (identity, num)
        storage.write_text(set_record.url(folder, name), json.dumps(set_record.unfinished(settings, num)))


def test_half_a_set_is_not_measured(tmp_path):
    (tmp_path / "steps-2").mkdir()
    (tmp_path / "steps-2" / "000000.png").write_bytes(b"")
    assert len(images.find(str(tmp_path / "steps-2"))) == 1, "a folder of somebody else's has no record"
    _begin(str(tmp_path / "other"))
    Path(tmp_path / "other" / "steps-2.json").rename(tmp_path / "steps-2.json")
    for name in ("steps-2", "steps-2/", "steps-2.npz", "steps-2.shards"):
        with pytest.raises(UserError, match="is not whole"):
            images.find(str(tmp_path / name))
