"""The batches of one rank, step after step, read ahead in the background."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imm_scale import rng
from imm_scale.data import codec as codecs
from imm_scale.data import plan
from imm_scale.data.dataset import Dataset
from imm_scale.data.plan import Layout
from imm_scale.data.prefetch import Prefetcher
from imm_scale.errors import UserError

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """One step's samples of one rank, or one micro-batch of them.

    Attributes:
        images_seen: the clock BEFORE this step's batch.
        x: (slots * M, C, H, W) fp32, normalized; zeros in padded slots.
        label: (slots * M,) int64 class indices; 0 in padded slots.
        ordinal: (slots * M,) int64 global ordinals images_seen + position, which name all random draws of a sample;
            0 in padded slots.
        weight: (slots,) fp32, 1 for a group and 0 for a padded slot.
    """

    images_seen: int
    x: Tensor
    label: Tensor
    ordinal: Tensor
    weight: Tensor

    def micro_batches(self, accumulation: int) -> list["Batch"]:
        """Splits into `accumulation` parts of contiguous slots, the same number in each."""
        slots, particles = len(self.weight), len(self.x) // len(self.weight)
        assert slots % accumulation == 0, (slots, accumulation)
        size = slots // accumulation
        parts = zip(
            self.x.split(size * particles),
            self.label.split(size * particles),
            self.ordinal.split(size * particles),
            self.weight.split(size),
            strict=True,
        )
        return [Batch(self.images_seen, *part) for part in parts]


class Loader:
    """Yields for ever the batches of one rank, from the clock `images_seen` on.

    What a batch holds follows from the manifest, the seed, block_samples, the global batch size and the clock alone;
    rank and layout only say which part of it comes here. Use it as a context manager: leaving it ends the reading.

    Args:
        manifest_url: URL of manifest.json.
        images_seen: where to start, a multiple of the global batch size.
        flip: mirror each sample left to right with probability 1/2.
        sigma_data: standard deviation of the normalized data.

    Attributes:
        manifest: the data set's description.
        data_seconds: time the consumer has waited for batches so far.

    Raises:
        UserError: a bad manifest or shard (at once, or from iteration when damage is met), a data set smaller than a
            global batch, a rank outside the layout, or flip with latents that cannot be mirrored.
    """

    def __init__(
        self,
        manifest_url: str,
        layout: Layout,
        rank: int,
        seed: int,
        block_samples: int = 32,
        images_seen: int = 0,
        flip: bool = False,
        sigma_data: float = 0.5,
    ) -> None:
        groups = plan.rank_groups(layout.num_groups, rank, layout.world_size)
        self._dataset = Dataset(manifest_url)
        self.manifest = self._dataset.manifest
        if flip and self.manifest.codec.kind != "pixels":
            raise UserError(
                "data.flip needs pixels: a mirrored image's vae latent is not the mirrored latent, and the shards "
                "hold no latents of mirrored images. Set data.flip=false"
            )
        self._table = plan.block_table(self._dataset.shard_samples, block_samples)
        plan.clock(images_seen, layout.global_batch_size, len(self._dataset))
        self._layout = layout
        self._positions = np.arange(groups.start * layout.particles, groups.stop * layout.particles)
        self._seed, self._block_samples = seed, block_samples
        self._flip, self._sigma_data = flip, sigma_data
        self.data_seconds = 0.0
        self._prefetcher = Prefetcher(self._batches(images_seen), _BATCHES_AHEAD)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the background reading and waits for it."""
        self._prefetcher.close()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        batch = next(self._prefetcher)
        self.data_seconds += time.perf_counter() - began
        return batch

    def _batches(self, images_seen: int) -> Iterator[Batch]:
        batch_size = self._layout.global_batch_size
        samples = self._dataset.shard_samples
        epoch, step = plan.clock(images_seen, batch_size, len(self._dataset))
        steps = plan.steps_per_epoch(batch_size, len(self._dataset))
        blocks: dict[int, NDArray[np.float16]] = {}
        while True:
            order = plan.epoch_order(samples, self._block_samples, self._seed, epoch)
            for k in range(step, steps):
                indices = plan.batch_indices(order, batch_size, k, self._positions)
                blocks = self._blocks_of(indices, blocks)
                yield self._assemble(indices, blocks, images_seen)
                images_seen += batch_size
            epoch, step = epoch + 1, 0

    def _blocks_of(
        self, indices: NDArray[np.int64], kept: dict[int, NDArray[np.float16]]
    ) -> dict[int, NDArray[np.float16]]:
        """The blocks of these samples, and no others.

        A position walks through a block in neighbouring steps and does not come back to it in the epoch, so the
        blocks of the last step are all that is worth keeping: at most one per position.
        """
        blocks = {}
        for block in np.unique(self._table.block_of(indices)).tolist():
            start, size = int(self._table.start[block]), int(self._table.size[block])
            blocks[block] = kept[block] if block in kept else self._dataset.read(start, start + size)
        return blocks

    def _assemble(self, indices: NDArray[np.int64], blocks: dict[int, NDArray[np.float16]], images_seen: int) -> Batch:
        block_of = self._table.block_of(indices)
        places = zip(block_of.tolist(), (indices - self._table.start[block_of]).tolist(), strict=True)
        stored = torch.from_numpy(np.stack([blocks[block][inside] for block, inside in places]))
        ordinal = images_seen + torch.from_numpy(self._positions)
        x = self._normalized(stored, ordinal)
        slots, particles = self._layout.slots, self._layout.particles
        weight = torch.zeros(slots)
        weight[: len(x) // particles] = 1.0
        return Batch(
            images_seen=images_seen,
            x=_pad(x, slots * particles),
            label=_pad(torch.from_numpy(self._dataset.labels[indices]), slots * particles),
            ordinal=_pad(ordinal, slots * particles),
            weight=weight,
        )

    def _normalized(self, stored: Tensor, ordinal: Tensor) -> Tensor:
        codec = self.manifest.codec
        raw = codecs.draw_raw(stored, codec.kind, self._seed, "posterior", ordinal)
        x = codecs.normalize(raw, codec.mean, codec.std, self._sigma_data)
        if self._flip:
            mirrored = rng.uniform(self._seed, "flip", ordinal)[:, 0] < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return x


def _pad(values: Tensor, length: int) -> Tensor:
    """Zeros after the values, up to `length` rows."""
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])
