"""The loss of samples that are never trained on, at the same draws every time."""

import math
from collections.abc import Iterator

import torch

from imm_scale.config.schema import Config
from imm_scale.data.dataset import Dataset
from imm_scale.data.loader import Batch
from imm_scale.data.sample_order import Layout
from imm_scale.data.spaces import SampleSpace
from imm_scale.errors import UserError
from imm_scale.parallel import world
from imm_scale.parallel.deepspeed_engine import Engine
from imm_scale.preflight import held_out_index

# Ordinals of held-out samples begin here, out of reach of training's clock, so their draws are their own.
_FIRST_ORDINAL = 1 << 48


class HeldOut:
    """This rank's part of the held-out samples, kept in host memory as stored; they are drawn on the device.

    The loss is that of the current weights, its times and noise the same at each call, so that its changes are the
    net's. The M particles of a group lie on one rank; the H mod M samples left over are not used.

    Args:
        dataset: of which `data.holdout` is a share, or what `data.holdout_manifest` names.
        space: of training; it reads samples as `dataset` stores them.

    Raises:
        UserError: fewer held-out samples than one group.
    """

    def __init__(
        self, config: Config, dataset: Dataset, space: SampleSpace, layout: Layout, rank: int, device: torch.device
    ):
        held_out = held_out_index(config, dataset)
        particles = layout.particles
        num_groups = len(held_out) // particles
        if num_groups == 0:
            raise UserError(
                f"{_said(config)} holds out {len(held_out)} samples, fewer than one group of "
                f"{particles} samples: hold out more"
            )
        # Not plan.rank_groups: more ranks than groups are fine here.
        first, last = rank * num_groups // layout.world_size, (rank + 1) * num_groups // layout.world_size
        self.num_groups, self._seed = num_groups, config.seed
        self._particles, self._micro = particles, layout.slots_per_micro_batch
        self._rounds = math.ceil(math.ceil(num_groups / layout.world_size) / self._micro)
        self._space, self._device = space.reading(dataset.manifest), device
        index = held_out[first * particles : last * particles]
        self._stored = torch.from_numpy(dataset.gather(index))
        self._label = torch.from_numpy(dataset.labels[index]).to(device)
        origin = _FIRST_ORDINAL // particles * particles
        self._ordinal = origin + torch.arange(first * particles, last * particles, device=device)

    def loss(self, engine: Engine) -> float:
        """The mean over all held-out groups; a collective."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in self._batches():
            total += engine.loss(batch)
        return float(world.all_sum(total)) / self.num_groups

    def _batches(self) -> Iterator[Batch]:
        """As many on every rank, the last ones padded with groups of weight 0."""
        size = self._micro * self._particles
        for start in range(0, self._rounds * size, size):
            part = slice(start, start + size)
            real = len(self._stored[part])
            x = torch.zeros(size, *self._space.shape, dtype=self._space.dtype, device=self._device)
            label, ordinal = torch.zeros(2, size, dtype=torch.int64, device=self._device)
            weight = torch.zeros(self._micro, device=self._device)
            label[:real], ordinal[:real] = self._label[part], self._ordinal[part]
            weight[: real // self._particles] = 1.0
            if real:
                stored = self._stored[part].to(self._device)
                self._space.from_stored(stored, self._seed, "posterior", ordinal[:real], out=x[:real])
            yield Batch(0, x, label, ordinal, weight)


def _said(config: Config) -> str:
    data = config.data
    return f"data.holdout={data.holdout:g}" if data.holdout_manifest is None else "data.holdout_manifest"
