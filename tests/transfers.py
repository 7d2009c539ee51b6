"""What a stretch of code reads from tensors, and which copies between devices it starts.

The meta device stands for a GPU. Whoever reads a value of its tensors fails, and copies to it are seen like any other.
"""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = str(Path(__file__).parents[1])
_PACKAGES = str(Path(torch.__file__).parents[1])
_READ, _TO_COPY, _COPY = torch.ops.aten._local_scalar_dense, torch.ops.aten._to_copy, torch.ops.aten.copy_


def _caller() -> str:
    """The file that asked torch, from the project's root or from the packages'; torch's optimizers count too."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        inside = name.removeprefix(_PACKAGES + "/").removeprefix(_ROOT + "/")
        if name != __file__ and not name.startswith("<") and (not inside.startswith("torch/") or "/optim/" in inside):
            return inside
        frame = frame.f_back
    raise AssertionError("torch has no caller")


class Transfers(TorchDispatchMode):
    """Use as a context manager, in the thread that is looked at.

    Attributes:
        operators: how often each was called, views included.
        reads: how often a value was read (`item`, `float`, a branch, `tolist`), by the file that asked for it.
        copies: (from, to, whether without waiting) of each copy between devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.copies: list[tuple[str, str, bool]] = []

    def __enter__(self) -> "Transfers":
        self._tolist = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.reads[_caller()] += 1
            return self._tolist(tensor)

        Tensor.tolist = tolist  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Tensor.tolist = self._tolist  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operators[str(func.overloadpacket)] += 1
        result = func(*args, **kwargs)
        if func.overloadpacket is _READ:
            self.reads[_caller()] += 1
        elif func.overloadpacket is _TO_COPY:
            self._note_copy(args[0], result, kwargs.get("non_blocking", False))
        elif func.overloadpacket is _COPY:
            self._note_copy(args[1], args[0], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        return result

    def _note_copy(self, source: Tensor, target: Tensor, without_waiting: bool) -> None:
        if source.device != target.device:
            self.copies.append((source.device.type, target.device.type, without_waiting))
