"""An iterator that runs ahead in one background thread."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Yields the items of `iterator` in order, at most `depth` of them made ahead.

    An exception in the iterator is raised to the consumer in its item's place. `close` waits for the item being made
    and drops the others.

    Args:
        prepare: called in the thread before anything else.
    """

    def __init__(self, iterator: Iterator[Item], depth: int, prepare: Callable[[], object] | None = None) -> None:
        self._iterator = iterator
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch", initializer=prepare)
        self._ahead: deque[Future[Item]] = deque(self._pool.submit(next, iterator) for _ in range(depth))

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        future = self._ahead.popleft()
        self._ahead.append(self._pool.submit(next, self._iterator))
        return future.result()

    def close(self) -> None:
        """Ends the thread once the batch under way is done."""
        self._pool.shutdown(wait=True, cancel_futures=True)
