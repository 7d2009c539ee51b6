"""Memory of batches, used again when nobody holds the batch any more."""

import math
import threading
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor


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
