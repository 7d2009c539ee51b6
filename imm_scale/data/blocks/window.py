"""The blocks of the present steps in memory, and those of the next ones on their way."""

import logging
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imm_scale.data import sample_order
from imm_scale.data.blocks.reader import BlockError, BlockReader, Target
from imm_scale.data.dataset import Dataset
from imm_scale.data.sample_order import BlockTable

log = logging.getLogger("imm_scale")

OnBadBlock = Literal["stop", "skip"]
HORIZON = 128  # steps looked ahead at most, even where memory would last for more
LONGEST_READ = 4 << 20  # bytes of joined neighbours
_BAD_SHARE = 0.01  # of all blocks may be replaced (at least one), then the run stops
_ATTEMPTS = 8  # blocks tried in place of a bad one


class Visit(NamedTuple):
    """A block and the steps, counted through all epochs, at which it is needed."""

    first: int
    last: int
    block: int


class _Arrival(NamedTuple):
    """A read under way, and the step that waits for it."""

    needed: int
    read: "Future[None]"


class Window:
    """Memory for `slots` blocks; fetches run ahead of the steps as far as it reaches.

    Args:
        visits: what is needed when, sorted by first; never more blocks at one step than `slots`.
        threads: concurrent ranged reads.
        on_bad_block: stop with a BlockError, or replace its samples by those of another block.
        seed: decides by which.
        held_out_blocks: blocks with samples that are never trained on, which replace no other.
    """

    def __init__(
        self,
        dataset: Dataset,
        table: BlockTable,
        reader: BlockReader,
        visits: Iterator[Visit],
        slots: int,
        variants: int,
        threads: int,
        on_bad_block: OnBadBlock,
        seed: int,
        held_out_blocks: frozenset[int] = frozenset(),
    ) -> None:
        self._held_out_blocks = held_out_blocks
        self._dataset, self._table, self._reader = dataset, table, reader
        self._visits, self._seed, self._on_bad_block = visits, seed, on_bad_block
        self._longest = int(table.size.max())
        shape = (slots, self._longest, variants, *dataset.manifest.stored_shape)
        self._latents: NDArray[Any] = np.empty(shape, dataset.manifest.stored_dtype)
        self._labels = np.empty(shape[:2], np.int64)
        self._flat = self._latents.reshape(-1, *shape[3:])
        self._free = deque(range(slots))
        self._last_use: dict[int, int] = {}  # of each block held: the last step that needs it
        self._slot_of = np.full(len(table.start), -1)
        self._arriving: deque[_Arrival] = deque()
        self._next = next(visits)
        self._bad: set[int] = set()
        self._bad_lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fetch")

    def bound_bytes(self, threads: int) -> int:
        """Most bytes of latents that wait here, or are on their way in so many threads."""
        return self._latents.nbytes + self._labels.nbytes + threads * LONGEST_READ

    def close(self) -> None:
        """Ends the readers; reads under way are waited for, those in line are dropped."""
        self._reader.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def locate(self, step: int, indices: NDArray[np.int64], variant: Tensor | None) -> tuple[NDArray[np.int64], Tensor]:
        """Waits for the samples of a step: rows for `take`, good until the next call, and labels (P,).

        Args:
            step: counted through all epochs, one more at each call.
            indices: (P,) global sample indices.
            variant: (P,) which latent of each sample, or None where there is one.

        Raises:
            BlockError: a block that cannot be read, or too many of them.
        """
        self._release(step)
        self._fetch_ahead(step + HORIZON)
        while self._arriving and self._arriving[0].needed <= step:
            self._arriving.popleft().read.result()
        blocks = self._table.block_of(indices)
        slots = self._slot_of[blocks]
        assert (slots >= 0).all(), (step, blocks[slots < 0])
        samples = slots * self._longest + indices - self._table.start[blocks]
        rows = samples * self._latents.shape[2] + (0 if variant is None else variant.numpy())
        return rows, torch.from_numpy(self._labels.reshape(-1)[samples])

    def take(self, rows: NDArray[np.int64], out: Tensor) -> None:
        """Copies rows of the last `locate` to memory of their type, (n, C', H, W) or (n, T)."""
        self._flat.take(rows, axis=0, out=out.numpy(), mode="clip")  # other modes copy once more

    def _release(self, step: int) -> None:
        for block in [block for block, last in self._last_use.items() if last < step]:
            del self._last_use[block]
            self._free.append(int(self._slot_of[block]))
            self._slot_of[block] = -1

    def _fetch_ahead(self, until: int) -> None:
        """Starts reading the next visits while there are slots; neighbours in a shard are one read."""
        run: list[Target] = []
        needed = 0
        while self._next.first <= until and (self._free or self._next.block in self._last_use):
            visit, self._next = self._next, next(self._visits)
            is_present = visit.block in self._last_use
            self._last_use[visit.block] = visit.last
            if is_present:  # as the next epoch comes back to it: it simply stays
                continue
            slot, size = self._free.popleft(), int(self._table.size[visit.block])
            self._slot_of[visit.block] = slot
            target = Target(visit.block, self._latents[slot, :size], self._labels[slot, :size])
            if run and not self._follows(run, target):
                self._start(run, needed)
                run = []
            needed = needed if run else visit.first
            run.append(target)
        if run:
            self._start(run, needed)

    def _follows(self, run: list[Target], target: Target) -> bool:
        return target.block == run[-1].block + 1 and self._reader.can_join(run[0].block, target.block, LONGEST_READ)

    def _start(self, run: list[Target], needed: int) -> None:
        self._arriving.append(_Arrival(needed, self._pool.submit(self._read, run)))

    def _read(self, run: list[Target]) -> None:
        """In a thread of the pool; what it raises goes to the step that needs the blocks."""
        for target, problem in zip(run, self._reader.read(run), strict=True):
            if problem is not None:
                self._replace(target, problem)

    def _replace(self, target: Target, problem: BlockError) -> None:
        """Fills a target from another block, the same one on every rank and whenever it is met."""
        if self._on_bad_block == "stop":
            raise problem
        blocks = len(self._table.start)
        most = max(1, int(_BAD_SHARE * blocks))
        with self._bad_lock:
            self._bad.add(target.block)
            if len(self._bad) > most:
                raise BlockError(
                    f"{len(self._bad)} of {blocks} blocks are bad, data.on_bad_block=skip allows {most}: {problem}"
                )
        log.warning("samples of another block stand in: %s", problem)
        for attempt in range(_ATTEMPTS):
            other = sample_order.replacement(target.block, attempt, blocks, self._seed)
            size = int(self._table.size[other])
            spare = Target(
                other, np.empty_like(target.latents, shape=(size, *target.latents.shape[1:])), np.empty(size, np.int64)
            )
            if other != target.block and other not in self._held_out_blocks and self._reader.read([spare]) == [None]:
                rows = np.arange(len(target.labels)) % size
                target.latents[:], target.labels[:] = spare.latents[rows], spare.labels[rows]
                self._reader.counters.add("skipped_blocks")
                return
        raise problem
