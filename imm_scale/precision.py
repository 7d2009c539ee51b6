"""How precisely networks compute, and whether this machine can: one place for training, sampling and encoding.

fp32 and tf32 are told apart by two flags of the process, bf16 and fp16 are autocast around fp32 weights. Torch's own
default lets convolutions round to tf32; here nothing rounds unless a key says so.
"""

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from imm_scale.errors import UserError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TF32_CAPABILITY = (8, 0)  # Ampere


def set_tf32(allowed: bool) -> None:
    """Whether fp32 matrix products and convolutions on NVIDIA GPUs may round their inputs to tf32 (10 bits).

    By torch's older flags: they hold in every version we support, and beside its newer `fp32_precision` they raise.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Around the networks that compute in this precision; after it the flags are as before."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_tf32(precision == "tf32")
    try:
        with torch.autocast(device.type, dtype=HALF.get(precision), enabled=precision in HALF):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


def check(precision: str, key: str) -> None:
    """Whether this machine computes in a precision; a warning where tf32 comes to nothing.

    Args:
        key: what the user set it by, for the message.

    Raises:
        UserError: a precision that this machine lacks.
    """
    if torch.cuda.is_available():
        _check_gpu(precision, key)
    elif precision == "fp16":
        raise UserError(f"{key}=fp16 needs a GPU: CPUs run fp16 a hundred times slower. Use {key}=bf16 or fp32")
    elif precision == "tf32":
        warnings.warn(f"{key}=tf32 is a mode of NVIDIA GPUs: this CPU computes in fp32", stacklevel=3)


def _check_gpu(precision: str, key: str) -> None:
    name = torch.cuda.get_device_name()
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{key}=bf16: {name} has none. Use {key}=fp16 or fp32")
    if precision == "tf32" and torch.cuda.get_device_capability() < _TF32_CAPABILITY:
        raise UserError(f"{key}=tf32: {name} has none, it came with Ampere. Use {key}=fp16 or fp32")


def check_compiler(key: str) -> None:
    """Whether torch.compile can build its kernels: with a C++ compiler on CPU, with triton and a C compiler on GPUs.

    Args:
        key: what the user set it by, for the message.

    Raises:
        UserError: what is missing.
    """
    if not torch.cuda.is_available():
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            raise UserError(
                f"{key}=true needs a C++ compiler, and there is no {compiler}: install it, "
                f"name yours in CXX, or use {key}=false"
            )
        return
    if importlib.util.find_spec("triton") is None:
        raise UserError(f"{key}=true needs triton on GPUs: pip install triton, or use {key}=false")
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]  # triton's own choice
    if not any(shutil.which(compiler) for compiler in compilers):
        raise UserError(
            f"{key}=true needs a C compiler for triton, and there is no {' or '.join(compilers)}: install one, name "
            f"yours in CC, or use {key}=false"
        )
