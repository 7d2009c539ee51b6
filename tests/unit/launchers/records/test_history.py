"""Which starts are followed by another."""

import pytest

from imm_scale.errors import UserError
from launchers.records.history import History, Start

JOB = "7"


def _start(outcome, step, end_step, failed_nodes=(), job=JOB):
    return Start(
        job, 0, ["node1", "node2"], step, 0.0, "abc", outcome, f"because {outcome}", end_step, list(failed_nodes)
    )


def _verdict(*starts, max_restarts=10):
    return History(JOB, list(starts)).verdict(max_restarts)


def test_the_first_start_is_free():
    assert _verdict().go_on


@pytest.mark.parametrize("outcome", ["preempted", "failed", "interrupted"])
def test_one_bad_start_is_followed_by_another(outcome):
    assert _verdict(_start(outcome, 0, 0)).go_on


@pytest.mark.parametrize("outcome", ["completed", "cancelled", "refused"])
def test_these_are_the_last(outcome):
    verdict = _verdict(_start(outcome, 0, 10))
    assert (verdict.go_on, verdict.reason) == (False, f"because {outcome}")


@pytest.mark.parametrize("outcome", ["preempted", "failed", "interrupted"])
def test_two_starts_without_progress_are_the_last(outcome):
    verdict = _verdict(_start("preempted", 0, 50), _start(outcome, 50, 50), _start(outcome, 50, 50))
    assert not verdict.go_on
    assert "no progress past step 50 in 2 starts" in verdict.reason
    assert f"because {outcome}" in verdict.reason


def test_a_step_between_two_idle_starts_is_progress():
    assert _verdict(_start("failed", 0, 0), _start("failed", 0, 1), _start("failed", 1, 1)).go_on


def test_any_number_of_preemptions_with_progress():
    assert _verdict(*(_start("preempted", step, step + 1) for step in range(500)), max_restarts=0).go_on


def test_failures_are_bounded_even_with_progress():
    starts = [_start("failed", step, step + 1) for step in range(4)]
    assert _verdict(*starts[:3], max_restarts=3).go_on
    verdict = _verdict(*starts, max_restarts=3)
    assert not verdict.go_on
    assert "--max-restarts is 3" in verdict.reason


def test_a_node_is_excluded_after_two_failures():
    history = History(JOB, [_start("failed", 0, 5, ["node2"]), _start("preempted", 5, 9)])
    assert history.excluded() == []
    history.starts.append(_start("interrupted", 9, 9, ["node2"]))
    assert history.excluded() == ["node2"]


def test_an_idle_start_that_names_the_bad_node_is_not_the_last():
    starts = [_start("failed", 0, 0, ["node2"]), _start("failed", 0, 0, ["node2"])]
    assert _verdict(*starts).go_on
    assert not _verdict(*starts, _start("failed", 0, 0)).go_on


def test_other_jobs_count_for_nothing():
    others = [_start("failed", 0, 0, ["node2"], job="6") for _ in range(5)]
    history = History(JOB, others)
    assert history.verdict(0).go_on
    assert history.excluded() == []


def test_it_is_read_as_it_was_written(tmp_path):
    history = History(JOB, [_start("failed", 0, 5, ["node2"])], "enough")
    history.save(str(tmp_path))
    assert History.load(str(tmp_path), JOB) == history
    assert History.load(str(tmp_path), "8").of_this_job == []
    (tmp_path / "launcher.json").write_text("{")
    with pytest.raises(UserError, match="remove it"):
        History.load(str(tmp_path), JOB)
