"""What this machine cannot do, in words for `Report.skip`; "" where it can."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.gpu.report import Context, Report
from imm_scale import precision as precisions
from imm_scale.errors import UserError


def lacks_compiler(context: Context) -> str:
    """Why torch.compile cannot run. At size `small` nothing is generated, so nothing is needed."""
    return "" if context.small else _refusal(precisions.check_compiler, "train.compile")


def compiles_afresh(context: Context, report: Report, name: str) -> bool:
    """Whether blocks can be compiled, without graphs or counts of earlier ones; says so where they cannot."""
    missing = lacks_compiler(context)
    if missing:
        report.skip(f"{name}, compiled", missing)
        return False
    torch.compiler.reset()
    counters.clear()
    return True


def lacks_xformers(context: Context) -> str:
    if context.device.type != "cuda":
        return "xformers needs a CUDA device"
    return "" if importlib.util.find_spec("xformers") is not None else "xformers is not installed"


def lacks_precision(context: Context, precision: str) -> str:
    """Why `precision` is not to be had. On the CPU all are but tf32: slow is good enough at size `small`."""
    if context.device.type == "cuda":
        return _refusal(precisions.check, precision, "precision")
    return "tf32 is a mode of NVIDIA GPUs" if precision == "tf32" else ""


def _refusal(check: Callable[..., None], *args: str) -> str:
    try:
        check(*args)
    except UserError as error:
        return str(error)
    return ""


def compile_without_generating() -> None:
    """From here on torch.compile traces and differentiates graphs but generates no kernels: at size `small` what is
    proven is the graphs, and half a minute of g++ for each would prove no more. Call before anything is compiled."""
    torch.compile = _default_backend(torch.compile, "aot_eager")


def _default_backend(compile_: Callable[..., Any], backend: str) -> Callable[..., Any]:
    @functools.wraps(compile_)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        return compile_(*args, **{"backend": backend, **kwargs})

    return compiled
