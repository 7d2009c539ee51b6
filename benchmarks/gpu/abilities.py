"""What this machine cannot do, in words for `Report.skip`; "" where it can."""

import functools
import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.report import Context


def lacks_compiler(context: Context) -> str:
    """Why torch.compile cannot run. At size `small` nothing is generated, so nothing is needed."""
    if context.small:
        return ""
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton"
    has_compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    return "" if has_compiler else "torch.compile needs a C compiler, with which triton builds its launchers"


def lacks_xformers(context: Context) -> str:
    if context.device.type != "cuda":
        return "xformers needs a CUDA device"
    return "" if importlib.util.find_spec("xformers") is not None else "xformers is not installed"


def lacks_precision(context: Context, precision: str) -> str:
    """Why `precision` is not to be had: bf16 and tf32 came with compute capability 8.0."""
    if precision == "tf32" and context.device.type != "cuda":
        return "tf32 is a mode of NVIDIA GPUs"
    if context.device.type != "cuda" or precision not in ("bf16", "tf32"):
        return ""
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"{precision} needs compute capability 8.0, this card has {major}.{minor}"


def compile_without_generating() -> None:
    """From here on torch.compile traces and differentiates graphs but generates no kernels: at size `small` what is
    proven is the graphs, and half a minute of g++ for each would prove no more. Call before anything is compiled."""
    torch.compile = _default_backend(torch.compile, "aot_eager")


def _default_backend(compile_: Callable[..., Any], backend: str) -> Callable[..., Any]:
    @functools.wraps(compile_)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        return compile_(*args, **{"backend": backend, **kwargs})

    return compiled
