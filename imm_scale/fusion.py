"""Chains of small tensor operations as one compiled graph on a GPU, whose host would launch them one by one.

A CPU runs them as they are written: nothing is launched there, and its Philox is numpy's.
"""

import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_COMPILERS = ("cc", "gcc", "clang")
# No contraction of a * b + c to one rounding, which would move times and weights away from what other devices compute.
_OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}
_override: bool | None = None


@functools.cache
def gpu_compiles() -> bool:
    """Whether torch.compile works for the GPU: it needs triton, a card triton knows, and a C compiler."""
    if importlib.util.find_spec("triton") is None:
        missing = "triton is not installed"
    elif torch.cuda.get_device_capability()[0] < 7:
        missing = f"triton does not know {torch.cuda.get_device_name()}"
    elif not (os.environ.get("CC") or any(map(shutil.which, _COMPILERS))):
        missing = f"triton needs a C compiler, and there is neither $CC nor {', '.join(_COMPILERS)}"
    else:
        return True
    warnings.warn(f"draws and loss run uncompiled, some 500 more launches a micro-batch: {missing}", stacklevel=2)
    return False


@contextmanager
def override(compiled: bool) -> Iterator[None]:
    """Compiles, or does not, whatever the device: to count and to compare."""
    global _override
    previous, _override = _override, compiled
    try:
        yield
    finally:
        _override = previous


def fused(dynamic: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Marks a function of tensors to be compiled where its first tensor is on a GPU.

    Args:
        dynamic: one graph for all shapes and integers, rather than one for each that comes.
    """

    def mark(function: Callable[P, T]) -> Callable[P, T]:
        compiled = functools.cache(lambda: torch.compile(function, dynamic=dynamic, options=_OPTIONS))

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            # Inside another graph it is a part of that graph.
            if torch.compiler.is_compiling() or not _compiles(args):
                return function(*args, **kwargs)
            return compiled()(*args, **kwargs)

        return call

    return mark


def _compiles(args: tuple[Any, ...]) -> bool:
    if _override is not None:
        return _override
    first = next(argument for argument in args if isinstance(argument, Tensor))
    return first.device.type == "cuda" and gpu_compiles()
