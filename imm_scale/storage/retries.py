"""Which errors of a remote store are tried again, how often, and what is said of them.

What a store does wrong for a while (it throttles, drops connections, restarts) is retried with growing pauses; what the
user can mend (credentials, a bucket that does not exist) is a UserError at once. No message holds a secret.
"""

import errno
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay

from imm_scale.errors import UserError
from imm_scale.storage.urls import shown

log = logging.getLogger("imm_scale")
Result = TypeVar("Result")
OnRetry = Callable[[BaseException], None]


@dataclass(frozen=True)
class RetryPolicy:
    """How long a failing remote request is retried.

    Attributes:
        seconds: after this long the error is raised; long enough for a server to restart.
        first_pause: seconds before the second try; doubled for each further one.
        longest_pause: bound of a pause; each is shortened by up to half at random, so that ranks spread out.
        timeout: seconds to connect, or without a byte, after which one try counts as failed.
    """

    seconds: float = 180.0
    first_pause: float = 0.1
    longest_pause: float = 10.0
    timeout: float = 20.0

    def pause(self, state: RetryCallState) -> float:
        """Seconds to wait after failed try number `state.attempt_number` (1, 2, ...)."""
        doublings = min(state.attempt_number - 1, 20)
        return min(self.longest_pause, self.first_pause * 2.0**doublings) * random.uniform(0.5, 1.0)


POLICY = RetryPolicy()
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_FINAL_ERRNO = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG)
_UNKNOWN_TO_THE_STORE = ("NotImplemented", "501")
_DAMAGED_ON_THE_WAY = ("BadDigest", "IncompleteBody", "InvalidDigest", "XAmzContentSHA256Mismatch")


def retry(url: str, action: Callable[[], Result], on_retry: OnRetry | None = None) -> Result:
    """The action's result; a failure that may pass is retried for `POLICY.seconds`.

    Args:
        url: what the action is about, for messages.
        on_retry: told of every failure that is retried.

    Raises:
        UserError: credentials, permissions, or no such bucket.
        FileNotFoundError, OSError: what cannot be mended by waiting, and what did not pass in time.
    """
    policy = POLICY

    def before_sleep(state: RetryCallState) -> None:
        error, pause = _failure(state), state.upcoming_sleep
        log.info("%s: %s, try %d follows in %.1f s", shown(url), type(error).__name__, state.attempt_number + 1, pause)
        if on_retry is not None:
            on_retry(error)

    def give_up(state: RetryCallState) -> NoReturn:
        error = _failure(state)
        cause = f"{type(error).__name__} {error_code(error)}".rstrip()
        tried = f"still after {state.attempt_number} tries in {policy.seconds:g} s"
        raise OSError(errno.EIO, f"{shown(url)}: {cause}, {tried}") from error

    attempts = Retrying(
        retry=retry_if_exception(lambda error: _may_pass(url, error)),
        wait=policy.pause,
        stop=stop_before_delay(policy.seconds),
        before_sleep=before_sleep,
        retry_error_callback=give_up,
    )
    try:
        return attempts(action)
    except network_errors() as error:
        mistake = _users_mistake(url, error)
        if mistake is None:
            raise
        raise mistake from None


def _failure(state: RetryCallState) -> BaseException:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error


@lru_cache(maxsize=1)
def network_errors() -> tuple[type[Exception], ...]:
    """What asynchronous file systems raise besides OSError; imported only where a remote store is used."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError, HTTPClientError
    from botocore.exceptions import ClientError as BotoClientError

    return (OSError, TimeoutError, ClientError, BotoCoreError, BotoClientError, HTTPClientError)


def error_code(error: BaseException) -> str:
    """The store's own word for an error, "" if it has none."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def is_unknown_to_store(error: BaseException) -> bool:
    """Whether the store says that it has no such kind of request, as some have no conditional writes."""
    return error_code(error) in _UNKNOWN_TO_THE_STORE


def _may_pass(url: str, error: BaseException) -> bool:
    """Whether another try may succeed."""
    return isinstance(error, network_errors()) and _users_mistake(url, error) is None and not _is_final(error)


def _users_mistake(url: str, error: BaseException) -> UserError | None:
    """Errors that no second try mends but the user does. Their own text is left out: it may quote credentials."""
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError, ProfileNotFound

    code, where = error_code(error), shown(url)
    if code == "NoSuchBucket":
        return UserError(f"{where}: the bucket does not exist; create it, or correct the URL")
    if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
        return UserError(
            f"{where}: no credentials ({type(error).__name__}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or give the machine a role"
        )
    if isinstance(error, PermissionError):
        return UserError(
            f"{where}: access refused ({code or 'no permission'}); check the credentials (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), what they may do, and AWS_ENDPOINT_URL"
        )
    return None


def _is_final(error: BaseException) -> bool:
    if isinstance(error, _FINAL) or is_unknown_to_store(error):
        return True
    number = error.errno if isinstance(error, OSError) else None
    return number in _FINAL_ERRNO and error_code(error) not in _DAMAGED_ON_THE_WAY
