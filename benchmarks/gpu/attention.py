"""Attention alone at the shapes of DiT-XL/2, by each kernel there is: which is fastest, and which torch picks itself.

The inputs of 64 samples, 113 MB, do not fit a GPU's L2.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import abilities
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.timing import Stopwatch, part

SAMPLES, TOKENS, HEADS = 64, 256, 16
HEAD_SIZES = (72, 64)  # of XL as published, and of one with heads a kernel need not pad
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_NO_KERNEL = ("No available kernel", "No viable backend", "No operator found")  # torch's words, and xformers'
_TIMES = 10
_BACKWARD = 2.5  # products of the backward pass over those of the forward pass: five to two
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(context: Context, report: Report) -> None:
    dtype = torch.float32 if context.small else torch.bfloat16
    kernels = list(_kernels(context, report))
    for size in HEAD_SIZES:
        shape = (2, 16, 3, 2, size) if context.small else (SAMPLES, TOKENS, 3, HEADS, size)
        qkv = torch.randn(shape, dtype=dtype, device=context.device, requires_grad=True)
        report.figure(f"head size {size}: torch picks", _picked(qkv))
        for name, kernel, attend in kernels:
            _measure(context, report, f"head size {size}: {name}", qkv, kernel, attend)


def _kernels(context: Context, report: Report) -> Iterator[tuple[str, Any, Attend]]:
    """(name, context to run in, attention over (N, T, H, K))."""
    yield "torch's own choice", nullcontext, _sdpa
    for name, backend in _BACKENDS.items():
        yield name, lambda backend=backend: sdpa_kernel(backend), _sdpa
    missing = abilities.lacks_xformers(context)
    if missing:
        report.skip("xformers", missing)
    else:
        from xformers.ops import memory_efficient_attention

        yield "xformers", nullcontext, memory_efficient_attention


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _picked(qkv: Tensor) -> str:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    choice = SDPBackend(torch._fused_sdp_choice(q, k, v))
    return next((name for name, backend in _BACKENDS.items() if backend == choice), choice.name)


def _measure(context: Context, report: Report, name: str, qkv: Tensor, kernel: Any, attend: Attend) -> None:
    gradient = torch.randn_like(qkv[:, :, 0])

    def forward() -> None:
        with torch.no_grad(), kernel():
            attend(*qkv.unbind(2))

    def both() -> None:
        qkv.grad = None
        with kernel():
            out = attend(*qkv.unbind(2))
        out.backward(gradient)

    samples, tokens, _, heads, size = qkv.shape
    flops = 4.0 * samples * heads * tokens**2 * size
    with part(report, name):
        try:
            once, twice = Stopwatch(context).medians(forward, both, times=_TIMES)
        except (RuntimeError, NotImplementedError) as error:
            if not any(message in str(error) for message in _NO_KERNEL):
                raise
            report.skip(name, f"not for these inputs on this device: {str(error).partition('. ')[0].strip()}")
            return
        report.figure(f"{name}, forward", flops / once / 1e12, "TFLOP/s")
        report.figure(f"{name}, forward and backward", (1 + _BACKWARD) * flops / twice / 1e12, "TFLOP/s")
        report.figure(f"{name}, time of both", 1e3 * twice, "ms")
