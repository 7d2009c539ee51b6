"""What a step trains on, and how it is made of samples as they are stored."""

import math
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from imm_scale.data.sample_order import Layout
from imm_scale.data.spaces import SampleSpace


@dataclass(frozen=True)
class Batch:
    """One step's samples of one rank, or one micro-batch of them.

    Attributes:
        images_seen: the clock BEFORE this step's batch.
        x: (slots * M, ...) samples as the net sees them; zeros in padded slots.
        condition: (slots * M,) int64 class indices; 0 in padded slots.
        ordinal: (slots * M,) int64 global ordinals images_seen + position, which name all random draws of a sample;
            0 in padded slots.
        weight: (slots,) fp32, 1 for a group and 0 for a padded slot.
        alignment: its groups start and end at multiples of this number.
    """

    images_seen: int
    x: Tensor
    condition: Tensor
    ordinal: Tensor
    weight: Tensor
    alignment: int = 1

    def micro_batches(self, accumulation: int) -> list["Batch"]:
        """Splits into `accumulation` parts of contiguous slots, the same number in each."""
        slots, particles = len(self.weight), len(self.x) // len(self.weight)
        assert slots % accumulation == 0, (slots, accumulation)
        size = slots // accumulation
        parts = zip(
            self.x.split(size * particles),
            self.condition.split(size * particles),
            self.ordinal.split(size * particles),
            self.weight.split(size),
            strict=True,
        )
        return [Batch(self.images_seen, *part) for part in parts]


@dataclass(frozen=True)
class Stored:
    """One step's samples of one rank as they are on storage.

    Attributes:
        images_seen: the clock before this step's batch.
        latents: (samples, C', H, W) fp16; or (samples, T) tokens of uint8, uint16 or int32.
        label: (slots * M,) int64 class indices; 0 in padded slots.
    """

    images_seen: int
    latents: Tensor
    label: Tensor


class BufferPool:
    """Hands out tensors of one shape, with whatever their memory holds.

    Fresh pages cost more than what is written to them, and allocators give large blocks back to the system at once.
    A tensor's memory comes back here when the last tensor that shares it is gone; whoever keeps it, keeps it intact.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._shape, self._dtype = shape, dtype
        self._free: list[NDArray[Any]] = []
        self._lock = threading.Lock()

    def take(self) -> Tensor:
        """A tensor of the pool's shape, values undefined; its memory comes back when the last view of it dies."""
        with self._lock:
            memory = self._free.pop() if self._free else np.empty(math.prod(self._shape), self._dtype)
        view = memory.view()  # lives exactly as long as the tensors made of it
        weakref.finalize(view, self._give_back, memory).atexit = False
        return torch.from_numpy(view).view(self._shape)

    def _give_back(self, memory: NDArray[Any]) -> None:
        with self._lock:
            self._free.append(memory)


class BatchMaker:
    """Draws, normalizes and pads one rank's samples on their device.

    On a GPU nothing here waits for it: what batches share was put there once, and pinned memory travels by itself.

    Args:
        positions: of this rank's samples in the global batch.
    """

    def __init__(
        self,
        positions: NDArray[np.int64],
        layout: Layout,
        space: SampleSpace,
        seed: int,
        device: torch.device,
    ):
        self._space, self._seed, self._device = space, seed, device
        samples = layout.slots * layout.particles
        is_real = torch.arange(samples) < len(positions)
        self._is_real = is_real.long().to(device)
        self._position = torch.from_numpy(np.pad(positions, (0, samples - len(positions)))).to(device)
        self._weight = is_real[:: layout.particles].float().to(device)
        self._x_shape = (samples, *space.shape)
        self._x_memory = BufferPool(self._x_shape, torch.empty(0, dtype=space.dtype).numpy().dtype)

    def __call__(self, stored: Stored) -> Batch:
        real = len(stored.latents)
        ordinal = torch.add(self._position, self._is_real, alpha=stored.images_seen)
        latents = stored.latents.to(self._device, non_blocking=True)
        x = self._new_x()
        self._space.from_stored(latents, self._seed, "posterior", ordinal[:real], out=x[:real])
        x[real:].zero_()
        label = stored.label.to(self._device, non_blocking=True)
        return Batch(stored.images_seen, x, label, ordinal, self._weight)

    def _new_x(self) -> Tensor:
        """Memory for a batch."""
        if self._device.type == "cpu":
            return self._x_memory.take()
        return torch.empty(self._x_shape, dtype=self._space.dtype, device=self._device)
