"""The batches of one rank, step after step, read ahead in the background."""

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imm_scale import devices, rng, storage
from imm_scale.data import sample_order
from imm_scale.data.batch import Batch, BatchMaker, BufferPool, Stored
from imm_scale.data.blocks.cache import BlockCache
from imm_scale.data.blocks.reader import BlockReader
from imm_scale.data.blocks.window import OnBadBlock, Visit, Window
from imm_scale.data.dataset import Dataset
from imm_scale.data.manifest import Manifest
from imm_scale.data.prefetch import Prefetcher
from imm_scale.data.sample_order import Layout
from imm_scale.data.spaces import Latents, LatentsConfig, SampleSpace
from imm_scale.errors import UserError

_BATCHES_AHEAD = 2
_REMOTE_THREADS = 16  # a remote store answers late, but many at once
_LOCAL_THREADS = min(2, max(1, (os.cpu_count() or 1) - 1))  # a file costs work, not waiting: leave the batch its core
_LEAST_BLOCKS_AHEAD = 16


@dataclass(frozen=True)
class Reading:
    """How blocks are read; nothing here changes what a batch holds, except that bad blocks may be replaced.

    Attributes:
        cache_dir: folder on the node's own disk where blocks are kept, or None.
        cache_bytes: bound of that folder.
        on_bad_block: "stop" or "skip".
    """

    cache_dir: str | None = None
    cache_bytes: int = 1 << 36
    on_bad_block: OnBadBlock = "stop"


@dataclass(frozen=True)
class _Located:
    """Where one step's samples are in memory."""

    images_seen: int
    rows: NDArray[np.int64]
    mirrored: Tensor | None
    label: Tensor


class Loader:
    """Yields for ever the batches of one rank, from the clock `images_seen` on.

    What a batch holds follows from the manifest, the seed, block_samples, the global batch size and the clock alone;
    rank and layout only say which part of it comes here. Use it as a context manager: leaving it ends the reading.

    Args:
        data: the opened data set, or the URL of its manifest.json.
        images_seen: where to start, a multiple of the global batch size.
        flip: mirror each sample left to right with probability 1/2; vae latents need shards that hold both.
        space: what samples are to the net; None: latents of standard deviation 0.5.
        device: where batches go. On a GPU they travel as stored and are drawn and normalized there.
        reading: cache and what to do about bad blocks.
        holdout: samples that never come, a share or a count as in `data.holdout`.

    Attributes:
        manifest: the data set's description.
        data_seconds: time the consumer has waited for batches so far.
        memory_bound_bytes: most bytes of latents in memory: held and coming blocks, reads under way, waiting batches.

    Raises:
        UserError: a bad manifest or shard (at once, or from iteration when damage is met), a data set smaller than a
            global batch, a rank outside the layout, or flip with latents that cannot be mirrored.
    """

    def __init__(
        self,
        data: Dataset | str,
        layout: Layout,
        rank: int,
        seed: int,
        block_samples: int = 32,
        images_seen: int = 0,
        flip: bool = False,
        space: SampleSpace | None = None,
        device: torch.device | str = "cpu",
        reading: Reading = Reading(),
        holdout: float = 0.0,
    ) -> None:
        groups = sample_order.rank_groups(layout.num_groups, rank, layout.world_size)
        self._dataset = data if isinstance(data, Dataset) else Dataset(data)
        self.manifest = self._dataset.manifest
        check_flip(flip, self.manifest)
        self._space = space or Latents.of(LatentsConfig(), self.manifest)
        self._held_out = sample_order.held_out(self._dataset.shard_samples, block_samples, seed, holdout)
        self._num_samples = len(self._dataset) - len(self._held_out)
        sample_order.clock(images_seen, layout.global_batch_size, self._num_samples)
        self._layout, self._device = layout, devices.numbered(torch.device(device))
        self._positions = np.arange(groups.start * layout.particles, groups.stop * layout.particles)
        self._seed, self._block_samples = seed, block_samples
        self._flip = flip
        self._table = sample_order.block_table(self._dataset.shard_samples, block_samples)
        cache = None if reading.cache_dir is None else BlockCache(reading.cache_dir, reading.cache_bytes)
        self._reader = BlockReader(self._dataset, self._table, cache)
        first_step = images_seen // layout.global_batch_size
        threads = _LOCAL_THREADS if storage.is_local(self._dataset.folder) else _REMOTE_THREADS
        self._window = Window(
            self._dataset,
            self._table,
            self._reader,
            self._visits(first_step),
            slots=len(self._positions) + max(_LEAST_BLOCKS_AHEAD, len(self._positions) // 4),
            variants=2 if self._mirrors_latents else 1,
            threads=threads,
            on_bad_block=reading.on_bad_block,
            seed=seed,
            held_out_blocks=frozenset(self._table.block_of(self._held_out).tolist()),
        )
        self.memory_bound_bytes = self._window.bound_bytes(threads) + self._batch_bytes()
        self._make_batch = BatchMaker(self._positions, layout, self._space, seed, self._device)
        self._stored_shape = (len(self._positions), *self.manifest.stored_shape)
        self._stored_memory = BufferPool(self._stored_shape, self.manifest.stored_dtype)
        self.data_seconds = 0.0
        gathered = map(self._gather, self._located(first_step))
        # A GPU draws and normalizes in the consumer's stream; on CPU that is done ahead, in the background.
        self._prefetcher: Prefetcher[Batch | Stored] = Prefetcher(
            map(self._make_batch, gathered) if self._device.type == "cpu" else gathered,
            _BATCHES_AHEAD,
            # Pinned memory belongs to a CUDA context, and a thread that has chosen no device makes one on GPU 0.
            prepare=partial(devices.use_device, self._device),
        )

    @property
    def counters(self) -> dict[str, int]:
        """What reading has met so far on this rank: requests, bytes, retries, damaged reads, ..."""
        return self._reader.counters.values()

    @property
    def _pins(self) -> bool:
        """Whether host memory is such that a GPU fetches it by itself, while this thread goes on."""
        return self._device.type == "cuda"

    @property
    def _mirrors_latents(self) -> bool:
        return self._flip and self.manifest.codec.kind != "pixels"

    def _batch_bytes(self) -> int:
        """Of the batches that wait, each as stored and as the net sees it."""
        width = self.manifest.stored_dtype.itemsize
        stored = width * int(np.prod(self.manifest.stored_shape)) + self._space.sample_bytes
        return (_BATCHES_AHEAD + 1) * self._layout.slots * self._layout.particles * stored

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the background reading and waits for it."""
        self._window.close()
        self._prefetcher.close()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        item = next(self._prefetcher)
        batch = item if isinstance(item, Batch) else self._make_batch(item)
        self.data_seconds += time.perf_counter() - began
        return batch

    def _epochs(self, first_step: int) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """(step of the epoch's begin, steps left out in it, sample indices (P, L) of this rank's positions)."""
        batch_size = self._layout.global_batch_size
        steps = sample_order.steps_per_epoch(batch_size, self._num_samples)
        first_epoch, skipped = divmod(first_step, steps)
        for epoch in itertools.count(first_epoch):
            order = sample_order.epoch_order(
                self._dataset.shard_samples, self._block_samples, self._seed, epoch, self._held_out
            )
            indices = order[: batch_size * steps].reshape(batch_size, steps)[self._positions]
            yield epoch * steps, skipped, indices
            skipped = 0

    def _visits(self, first_step: int) -> Iterator[Visit]:
        for begin, skipped, indices in self._epochs(first_step):
            visits = sample_order.schedule(indices, self._table, skipped)
            for first, last, block in zip(visits.first, visits.last, visits.block, strict=True):
                yield Visit(begin + int(first), begin + int(last), int(block))

    def _located(self, first_step: int) -> Iterator[_Located]:
        """Each is good until the next one is asked for."""
        for begin, skipped, indices in self._epochs(first_step):
            for k in range(skipped, indices.shape[1]):
                images_seen = (begin + k) * self._layout.global_batch_size
                mirrored = self._mirrored(images_seen) if self._flip else None
                variant = mirrored.to(torch.int64) if mirrored is not None and self._mirrors_latents else None
                rows, label = self._window.locate(begin + k, indices[:, k], variant)
                yield _Located(images_seen, rows, None if self._mirrors_latents else mirrored, label)

    def _gather(self, located: _Located) -> Stored:
        """Samples as stored, mirrored where that is done here, in memory from which the device can fetch them."""
        latents, label = self._new_stored(), self._new_label()
        self._window.take(located.rows, latents)
        if located.mirrored is not None:
            latents[located.mirrored] = latents[located.mirrored].flip(-1)
        label[: len(latents)] = located.label
        return Stored(located.images_seen, latents, label)

    def _new_stored(self) -> Tensor:
        """Memory for samples as stored; torch keeps pinned memory for later use itself."""
        if self._pins:
            dtype = torch.from_numpy(np.empty(0, self.manifest.stored_dtype)).dtype
            return torch.empty(self._stored_shape, dtype=dtype, pin_memory=True)
        return self._stored_memory.take()

    def _new_label(self) -> Tensor:
        """Memory for labels, 0 in padded slots."""
        return torch.zeros(self._layout.slots * self._layout.particles, dtype=torch.int64, pin_memory=self._pins)

    def _mirrored(self, images_seen: int) -> Tensor:
        ordinal = images_seen + torch.from_numpy(self._positions)
        return rng.uniform(self._seed, "flip", ordinal)[:, 0] < 0.5


def check_flip(flip: bool, manifest: Manifest) -> None:
    """Raises UserError for `data.flip` with samples that have no mirror image."""
    if flip and manifest.vocabulary is not None:
        raise UserError("data.flip=true: sequences of tokens have no mirror image; set data.flip=false")
    if flip and manifest.codec.kind != "pixels" and not manifest.flipped:
        raise UserError(
            "data.flip needs pixels or shards with mirrored latents: a mirrored image's vae latent is not the "
            "mirrored latent. Encode with imm-scale encode --flip, or set data.flip=false"
        )
