"""All shards of a manifest, opened and checked, read by global sample index."""

import bisect
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imm_scale import storage
from imm_scale.data import sample_order
from imm_scale.data.manifest import Manifest, ShardInfo
from imm_scale.data.shards import ShardReader, open_of
from imm_scale.data.spaces import Latents, LatentsConfig, SampleSpace

_OPENING_THREADS = 16
REFERENCE_POSTERIOR = "reference_posterior"  # purpose of what is drawn of samples that are looked at in order


class Dataset:
    """The samples of a manifest. Global sample indices count through its shards in the manifest's order.

    Opening reads the manifest and every index, and compares every shard's size with the manifest.

    Attributes:
        manifest: the data set's description.
        folder: URL of the folder it lies in, with its shards.
        labels: (N,) class indices of all samples.

    Raises:
        UserError: a bad manifest, or a shard or index that is not what the manifest says.
    """

    def __init__(self, manifest_url: str) -> None:
        self.manifest = manifest = Manifest.load(manifest_url)
        self.folder = storage.parent(manifest_url)
        with ThreadPoolExecutor(_OPENING_THREADS) as pool:
            self.shards = list(pool.map(self._open, manifest.shards))
        self.shard_samples = [info.samples for info in manifest.shards]
        self.labels: NDArray[np.int64] = np.concatenate([shard.labels for shard in self.shards])
        self._first = [0, *itertools.accumulate(self.shard_samples)]

    def _open(self, info: ShardInfo) -> ShardReader:
        return open_of(self.manifest, self.folder, info)

    def __len__(self) -> int:
        return len(self.labels)

    def place(self, start: int, stop: int) -> tuple[int, int, int]:
        """The shard that holds samples [start, stop), and their numbers inside it."""
        shard = bisect.bisect_right(self._first, start) - 1
        assert start < stop <= self._first[shard + 1], (start, stop)
        first = self._first[shard]
        return shard, start - first, stop - first

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Stored arrays (n, C', H, W) or (n, T) of samples [start, stop) of one shard, by one ranged read.

        Raises:
            UserError: a shard that is short or damaged.
        """
        shard, first, last = self.place(start, stop)
        return self.shards[shard].read(first, last)

    def gather(self, index: NDArray[np.int64]) -> NDArray[Any]:
        """Stored arrays (n, C', H, W) or (n, T) of ascending sample indices, a ranged read for each run of neighbours.

        Raises:
            UserError: as `read` does.
        """
        out = np.empty((len(index), *self.manifest.stored_shape), self.manifest.stored_dtype)
        shard = np.searchsorted(self._first, index, side="right")
        cuts = np.nonzero((np.diff(index) != 1) | (np.diff(shard) != 0))[0] + 1
        for first, last in zip([0, *cuts], [*cuts, len(index)], strict=True):
            if first < last:
                out[first:last] = self.read(int(index[first]), int(index[last - 1]) + 1)
        return out


def read_all(
    manifest_url: str, chunk_samples: int = 256, seed: int = 0, space: SampleSpace | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sample once, in the manifest's order: x (n, C, H, W) and label (n,) as `read_indexed` yields them."""
    for _, x, label in read_indexed(Dataset(manifest_url), chunk_samples, seed, space):
        yield x, label


def read_indexed(
    dataset: Dataset,
    chunk_samples: int = 256,
    seed: int = 0,
    space: SampleSpace | None = None,
    part: int = 0,
    parts: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Samples in order, chunk by chunk; every `parts`-th chunk from the `part`-th on: the reference of an evaluation.

    Args:
        space: what samples are to the net, read as this data set stores them; None: latents of deviation 0.5.

    Yields:
        index (n,) int64, x (n, ...) as the net sees it and label (n,) int64, n at most `chunk_samples`. A `vae` latent
        is one draw of its posterior, named by the seed and the sample's index, so it is the same in every pass.

    Raises:
        UserError: a shard that is short or damaged.
    """
    manifest = dataset.manifest
    space = Latents.of(LatentsConfig(), manifest) if space is None else space.reading(manifest)
    table = sample_order.block_table(dataset.shard_samples, chunk_samples)
    for start, size in list(zip(table.start.tolist(), table.size.tolist(), strict=True))[part::parts]:
        stored = torch.from_numpy(dataset.read(start, start + size))
        index = torch.arange(start, start + size)
        x = space.from_stored(stored, seed, REFERENCE_POSTERIOR, index)
        yield index, x, torch.from_numpy(dataset.labels[start : start + size])
