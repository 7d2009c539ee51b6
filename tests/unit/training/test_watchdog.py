"""Who is to blame for a hang, and when a step counts as one."""

import time

import pytest

from imm_scale.parallel.world import World
from imm_scale.training.watchdog import START_SECONDS, Answer, Watchdog, blame, collective_patience

HOSTS = ["a", "b", "b", "c"]


def _answer(rank: int, collectives: int, phase: str = "the vote") -> Answer:
    return Answer(rank, HOSTS[rank], 12, phase, 61.0, collectives, f"gloo:all_reduce number {collectives}")


def test_whoever_does_not_answer_hangs():
    message = blame([_answer(0, 5), _answer(2, 5)], HOSTS)
    assert message == "rank 1 (b), rank 3 (c) hangs: it does not answer, so it is stopped, dead, or its node is cut off"


def test_among_those_that_answer_it_is_the_one_behind():
    message = blame([_answer(0, 5), _answer(1, 4, "reading data"), _answer(2, 5), _answer(3, 5)], HOSTS)
    assert message.startswith("rank 1 (b) has been in step 12, reading data, for 61 s")


def test_where_all_are_alike_it_is_the_network():
    assert "the network hangs" in blame([_answer(rank, 5) for rank in range(4)], HOSTS)


def test_a_rank_that_is_alone_hangs_itself():
    message = blame([_answer(0, 5, "reading data")], HOSTS[:1])
    assert message.startswith("rank 0 (a) has been in step 12, reading data, for 61 s")
    assert message.endswith("; it hangs there")


def test_a_deadline_is_a_multiple_of_the_median_step_with_a_floor(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    dog = Watchdog("/nowhere", World(), None, ["a"], "call")
    assert dog.limit == START_SECONDS
    for seconds in (10.0, 100.0, 60.0):
        now[0] += seconds
        dog.step_done()
    assert dog.limit == pytest.approx(20 * 60.0)
    now[0] += 5000.0
    dog.step_done(slow=True)
    assert dog.limit == pytest.approx(20 * 60.0), "a step that wrote a checkpoint says nothing of the others"
    dog.allow(3000.0)
    assert dog.limit == 3000.0
    for _ in range(200):
        now[0] += 0.1
        dog.step_done()
    assert dog.limit == 600.0
    for _ in range(200):
        now[0] += 500.0
        dog.step_done()
    assert dog.limit == START_SECONDS, "beyond that torch's own timeout of a collective would come first"


def test_torch_gives_up_a_collective_long_after_the_watchdog():
    for timeout in (None, 60.0, 1800.0, 5000.0):
        assert collective_patience(timeout) >= 1.5 * max(START_SECONDS, timeout or 0.0)


def test_what_the_user_sets_holds_from_the_second_step_on():
    dog = Watchdog("/nowhere", World(), 5.0, ["a"], "call")
    assert dog.limit == START_SECONDS
    dog.step_done()
    assert dog.limit == 5.0
