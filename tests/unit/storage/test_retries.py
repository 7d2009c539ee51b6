"""What is retried, with which pauses, and how it ends."""

import time
from concurrent.futures import CancelledError

import pytest

from imm_scale.errors import UserError
from imm_scale.storage import retries
from imm_scale.storage.retries import RetryPolicy, retry

URL = "s3://user:secret@host/bucket/file"


class Clock:
    """Time that passes only in pauses."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "sleep", clock.sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(retries, "POLICY", RetryPolicy(seconds=100.0, first_pause=1.0, longest_pause=20.0))
    return clock


def _failing(times: int, error: Exception):
    left = [times]

    def action() -> str:
        if left[0]:
            left[0] -= 1
            raise error
        return "done"

    return action


def test_pauses_double_up_to_the_longest_and_are_shortened_by_up_to_half(clock):
    told = []
    assert retry(URL, _failing(7, ConnectionError("reset")), told.append) == "done"
    assert len(told) == len(clock.pauses) == 7
    for pause, longest in zip(clock.pauses, (1, 2, 4, 8, 16, 20, 20), strict=True):
        assert longest / 2 <= pause <= longest
    assert len({pause / longest for pause, longest in zip(clock.pauses, (1, 2, 4, 8, 16, 20, 20), strict=True)}) == 7


def test_no_pause_leads_past_the_time_and_the_message_says_how_often(clock):
    with pytest.raises(OSError, match=r"s3://host/bucket/file: TimeoutError, still after \d+ tries in 100 s") as caught:
        retry(URL, _failing(1000, TimeoutError()))
    assert 80 <= clock.now < 100  # the next pause, of 20 s at most, did not fit
    assert f"after {len(clock.pauses) + 1} tries" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), ValueError("ours")])
def test_what_waiting_does_not_mend_is_raised_at_once(clock, error):
    with pytest.raises(type(error)) as caught:
        retry(URL, _failing(1, error))
    assert caught.value is error and not clock.pauses


def test_a_users_mistake_is_one_clear_error_at_once(clock):
    with pytest.raises(UserError, match="access refused") as caught:
        retry(URL, _failing(1, PermissionError("key AKIA123")))
    assert "AKIA" not in str(caught.value) and "secret" not in str(caught.value) and not clock.pauses


def test_who_is_told_of_a_retry_can_end_it(clock):
    def stop(error: BaseException) -> None:
        raise CancelledError from error

    with pytest.raises(CancelledError):
        retry(URL, _failing(1000, ConnectionError("reset")), stop)
    assert not clock.pauses
