"""Host memory that holds a copy of a rank's slices while a checkpoint is written from it."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from imm_scale import devices
from imm_scale.parallel.param_slice import ParamSlice

# Elements of a chunk. torch rounds what it pins up to a power of two: 16 GB for 10.8 in one piece.
LARGEST_CHUNK, SMALLEST_CHUNK = 1 << 26, 1 << 18  # 256 MiB and 1 MiB of fp32


def chunk_sizes(numel: int) -> Iterator[int]:
    """Powers of two, falling, that together hold so many elements and less than `SMALLEST_CHUNK` more."""
    while numel > 0:
        size = min(max(1 << (numel.bit_length() - 1), SMALLEST_CHUNK), LARGEST_CHUNK)
        yield size
        numel -= size


def cut(chunks: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Consecutive stretches (size,) of flat chunks (n,), in the parts that the borders of chunks make of each."""
    rest = deque(chunks)
    stretches = []
    for size in sizes:
        parts: list[Tensor] = []
        while size > 0:
            parts.append(rest[0][:size])
            rest[0] = rest[0][size:]
            size -= parts[-1].numel()
            if rest[0].numel() == 0:
                rest.popleft()
        stretches.append(tuple(parts))
    return stretches


def _empty(numel: int, pinned: bool) -> Tensor:
    return torch.empty(numel, dtype=torch.float32, pin_memory=pinned)


class HostCopy:
    """Memory for one copy of these slices, made once by `allocate` and filled anew by each save.

    `begin` on the training thread, `take` on any other; nothing may write to the slices in between and until `taken`.

    Args:
        slices: the slices, live.
    """

    def __init__(self, slices: Sequence[ParamSlice[Tensor]]):
        self._slices = slices
        self._sources = [tensor.detach() for part in slices for tensor in part.states.values()]
        self._device = next((s.device for s in self._sources if s.is_cuda), torch.device("cpu"))
        self._places: list[tuple[Tensor, ...]] = []
        self._stream: torch.cuda.Stream | None = None
        self._ready: torch.cuda.Event | None = None
        self.taken = threading.Event()
        self.taken.set()

    @property
    def from_gpu(self) -> bool:
        """Whether anything comes from a GPU, for which alone pinned memory is faster."""
        return self._device.type == "cuda"

    def allocate(self, pinned: bool) -> str:
        """Makes the memory, in place of what there was. What kept it from being made, or ""."""
        self.release()
        sizes = [source.numel() for source in self._sources]
        try:
            self._places = cut([_empty(numel, pinned) for numel in chunk_sizes(sum(sizes))], sizes)
        except (RuntimeError, MemoryError) as error:
            return f"{4 * sum(sizes) / 2**30:.1f} GiB: {error}"
        return ""

    def release(self) -> None:
        """Gives the memory back to the system: torch would keep what it has pinned."""
        self._places = []
        if torch.cuda.is_available():
            torch._C._host_emptyCache()

    def begin(self) -> None:
        self.taken.clear()
        if self.from_gpu:
            self._stream = self._stream or torch.cuda.Stream()
            self._ready = torch.cuda.current_stream().record_event()

    def take(self) -> list[ParamSlice[tuple[Tensor, ...]]]:
        """The slices with the values of `begin`, safe from further steps until the next `begin`."""
        try:
            self._copy()
        finally:
            self.taken.set()
        places = iter(self._places)
        return [
            ParamSlice(s.name, s.shape, s.offset, {state: next(places) for state in s.states}) for s in self._slices
        ]

    def _copy(self) -> None:
        devices.use_device(self._device)
        with torch.cuda.stream(self._stream):  # of None: nothing at all
            if self._stream is not None and self._ready is not None:
                self._stream.wait_event(self._ready)
            for parts, source in zip(self._places, self._sources, strict=True):
                for part, values in zip(parts, source.split([part.numel() for part in parts]), strict=True):
                    part.copy_(values, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
