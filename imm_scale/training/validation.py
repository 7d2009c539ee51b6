"""The loss of samples that are never trained on, at the same draws every time."""

import math
from collections.abc import Iterator

import torch

from imm_scale.config.schema import Config
from imm_scale.data import codec as codecs
from imm_scale.data import sample_order
from imm_scale.data.dataset import Dataset
from imm_scale.data.loader import Batch
from imm_scale.data.sample_order import Layout
from imm_scale.errors import UserError
from imm_scale.parallel import world
from imm_scale.parallel.deepspeed_engine import Engine

# Ordinals of held-out samples begin here, out of reach of training's clock, so their draws are their own.
_FIRST_ORDINAL = 1 << 48


class HeldOut:
    """This rank's part of the held-out samples, kept in memory as stored.

    The loss is that of the current weights, its times and noise the same at each call, so that its changes are the
    net's. The M particles of a group lie on one rank; the H mod M samples left over are not used.

    Raises:
        UserError: fewer held-out samples than one group.
    """

    def __init__(self, config: Config, dataset: Dataset, layout: Layout, rank: int):
        held = sample_order.held_out(dataset.shard_samples, config.data.block_samples, config.seed, config.data.holdout)
        particles = layout.particles
        num_groups = len(held) // particles
        if num_groups == 0:
            raise UserError(
                f"data.holdout={config.data.holdout:g} holds out {len(held)} samples, fewer than one group of "
                f"method.particles={particles}: hold out more"
            )
        # Not plan.rank_groups: more ranks than groups are fine here.
        first, last = rank * num_groups // layout.world_size, (rank + 1) * num_groups // layout.world_size
        self.num_groups, self._seed = num_groups, config.seed
        self._particles, self._micro = particles, layout.slots_per_micro_batch
        self._rounds = math.ceil(math.ceil(num_groups / layout.world_size) / self._micro)
        self._sigma_data = config.data.space.sigma_data  # type: ignore[attr-defined]
        self._codec, self._shape = dataset.manifest.codec, dataset.manifest.latent_shape
        index = held[first * particles : last * particles]
        self._stored = torch.from_numpy(dataset.gather(index))
        self._label = torch.from_numpy(dataset.labels[index])
        origin = _FIRST_ORDINAL // particles * particles
        self._ordinal = origin + torch.arange(first * particles, last * particles)

    def loss(self, engine: Engine) -> float:
        """The mean over all held-out groups; a collective."""
        total = sum((engine.loss(batch) for batch in self._batches()), torch.zeros((), dtype=torch.float64))
        return float(world.all_sum(total.to(engine.device))) / self.num_groups

    def _batches(self) -> Iterator[Batch]:
        """As many on every rank, the last ones padded with groups of weight 0."""
        size = self._micro * self._particles
        for start in range(0, self._rounds * size, size):
            part = slice(start, start + size)
            stored, ordinal = self._stored[part], self._ordinal[part]
            x = torch.zeros(size, *self._shape)
            if len(stored):
                raw = codecs.draw_raw(stored, self._codec.kind, self._seed, "posterior", ordinal)
                x[: len(stored)] = codecs.normalize(raw, self._codec.mean, self._codec.std, self._sigma_data)
            weight = torch.zeros(self._micro)
            weight[: len(stored) // self._particles] = 1.0
            label, padded = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
            label[: len(stored)], padded[: len(stored)] = self._label[part], ordinal
            yield Batch(0, x, label, padded, weight)
