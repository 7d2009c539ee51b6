"""Blocks of a data set, read by several threads at once, checked, tried again, and counted."""

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imm_scale import storage
from imm_scale.data.blocks.cache import BlockCache
from imm_scale.data.dataset import Dataset
from imm_scale.data.sample_order import BlockTable
from imm_scale.data.shards import DamagedBlockError
from imm_scale.errors import UserError

_READINGS = 4  # of a block whose bytes come damaged: a wire may err, a disk errs every time
COUNTERS = ("requests", "bytes", "retries", "damaged_reads", "cache_hits", "skipped_blocks")


class BlockError(UserError):
    """A block that could not be read, with its shard and the cause."""


class Counters:
    """What the reading of one rank has met so far, by the names in COUNTERS; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> None:
        """Raises one of COUNTERS; safe from any thread."""
        assert name in COUNTERS, name
        with self._lock:
            self._values[name] += amount

    def values(self) -> dict[str, int]:
        """All counts so far, by name."""
        with self._lock:
            return {name: self._values[name] for name in COUNTERS}


@dataclass(frozen=True)
class Target:
    """A block to read and where its (n, variants, C', H, W) latents, or (n, 1, T) tokens, and (n,) labels go."""

    block: int
    latents: NDArray[Any]
    labels: NDArray[np.int64]


class BlockReader:
    """Reads blocks into arrays given to it, through the node's cache if there is one."""

    def __init__(self, dataset: Dataset, table: BlockTable, cache: BlockCache | None) -> None:
        self._dataset, self._table, self._cache = dataset, table, cache
        self.counters = Counters()
        self._stopping = threading.Event()
        self._local = threading.local()

    def stop(self) -> None:
        """Ends the retries of reads under way: they fail with CancelledError."""
        self._stopping.set()

    def can_join(self, first: int, last: int, longest: int) -> bool:
        """Whether the blocks from first to last lie in one shard, in at most `longest` bytes."""
        (shard, start, _), (same, _, stop) = self._place(first), self._place(last)
        if shard != same:
            return False
        begin, end = self._dataset.shards[shard].span(start, stop)
        return end - begin <= longest

    def read(self, targets: Sequence[Target]) -> list[BlockError | None]:
        """Fills the targets, which are neighbours in one shard, by one ranged read where the cache holds none.

        Returns:
            For each target None, or why it could not be read.

        Raises:
            UserError: what would befall every block, as refused credentials.
        """
        data: list[bytes | memoryview | None] = [self._cached(target.block) for target in targets]
        if not any(data):
            data = self._read_joined(targets)
        return [self._fill(target, content) for target, content in zip(targets, data, strict=True)]

    def _place(self, block: int) -> tuple[int, int, int]:
        start = int(self._table.start[block])
        return self._dataset.place(start, start + int(self._table.size[block]))

    def _key(self, block: int) -> str:
        shard, start, stop = self._place(block)
        return f"{self._dataset.shards[shard].sha256[:32]}-{start}-{stop}"

    def _cached(self, block: int) -> bytes | None:
        data = None if self._cache is None else self._cache.get(self._key(block))
        if data is not None:
            self.counters.add("cache_hits")
        return data

    def _read_joined(self, targets: Sequence[Target]) -> list[bytes | memoryview | None]:
        """Views into this thread's own buffer, good until it reads again here."""
        places = [self._place(target.block) for target in targets]
        shard = self._dataset.shards[places[0][0]]
        spans = [shard.span(start, stop) for _, start, stop in places]
        begin, end = spans[0][0], spans[-1][1]
        buffer = self._buffer(end - begin)
        self.counters.add("requests")
        try:
            length = storage.read_into(shard.url, begin, buffer, self._on_retry)
        except OSError:
            return [None] * len(targets)  # each on its own then, so that the error names its block
        self.counters.add("bytes", length)
        return [buffer[first - begin : min(last - begin, length)] for first, last in spans]

    def _buffer(self, length: int) -> memoryview:
        """Memory of this thread that it uses again and again: fresh pages cost more than the reading itself."""
        if len(getattr(self._local, "buffer", b"")) < length:
            self._local.buffer = bytearray(length)
        return memoryview(self._local.buffer)[:length]

    def _read_range(self, url: str, start: int, stop: int) -> bytes:
        self.counters.add("requests")
        data = storage.read_range(url, start, stop, self._on_retry)
        self.counters.add("bytes", len(data))
        return data

    def _on_retry(self, error: BaseException) -> None:
        self.counters.add("retries")
        if self._stopping.is_set():
            raise CancelledError from error

    def _fill(self, target: Target, data: bytes | memoryview | None) -> BlockError | None:
        shard_number, start, stop = self._place(target.block)
        shard = self._dataset.shards[shard_number]
        problem: Exception | None = None
        for _ in range(_READINGS):
            try:
                data = data or self._read_range(shard.url, *shard.span(start, stop))
                shard.decode(data, start, stop, target.latents)
            except DamagedBlockError as error:
                self.counters.add("damaged_reads")
                self._forget(target.block)
                data, problem = None, error  # read again
            except OSError as error:
                problem = error
                break
            else:
                target.labels[:] = shard.index["label"][start:stop]
                self._remember(target.block, data)
                return None
        where = f"{storage.shown(shard.url)}: block {target.block} (samples {start} to {stop - 1})"
        return BlockError(
            f"{where} cannot be read: {problem}. Mend the shard (imm-scale verify --repair), or go on "
            "without such blocks: data.on_bad_block=skip"
        )

    def _remember(self, block: int, data: bytes | memoryview) -> None:
        if self._cache is not None:
            self._cache.put(self._key(block), data)

    def _forget(self, block: int) -> None:
        if self._cache is not None:
            self._cache.drop(self._key(block))
