"""The pair of passes beside a stock network of the same size: diffusers' DiT, in one process and in turn with ours.

Both run one pass without gradient and one with, on 64 samples, ours as a training step does. Both have random weights
in fp32 and multiply in bf16 by autocast; both attend by `scaled_dot_product_attention`; both are compiled block by
block. The stock network differs in what it is: one time instead of two, an embedding of time and label in each of its
blocks, and under autocast its residual stream and its conditioning are in bf16, where ours are in fp32 and move twice
the bytes.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import abilities
from benchmarks.gpu.case import SEED, Case, net_config
from benchmarks.gpu.report import Context, Report
from benchmarks.gpu.step import LARGEST
from benchmarks.gpu.timing import Stopwatch, compilation, part
from imm_scale.models.dit import DiTConfig
from imm_scale.precision import computing

try:  # with the module, not in `run`: it takes seconds, and the section before is still running then
    from diffusers import DiTTransformer2DModel

    _MISSING = ""
except (ImportError, RuntimeError) as error:  # diffusers raises the second where one of its own imports fails
    _MISSING = f"diffusers cannot be imported (pip install -e '.[vae]'): {error}"

SAMPLES = 64
AT_LEAST = {"compiled": 1.0, "eager": 1.3}  # our rate compiled over the stock network's, aimed at


def run(context: Context, report: Report) -> None:
    if _MISSING:
        report.skip("stock network", _MISSING)
        return
    with compilation(context), part(report, f"{LARGEST} beside diffusers' DiT"):
        _compare(context, report)


def _compare(context: Context, report: Report) -> None:
    samples, config = 8 if context.small else SAMPLES, net_config(context, LARGEST)
    ours = Case(config, samples, "bf16", compiled=False, device=context.device)
    stock = StockCase(config, samples, context.device)
    eager = _seconds(context, report, ours, stock, "eager")
    report.figure("our rate eager over diffusers' eager", eager[1] / eager[0])
    why_not = abilities.lacks_compiler(context)
    if why_not:
        report.skip("compiled", why_not)
        return
    ours.net.compile_blocks()
    stock.compile()
    compiled = _seconds(context, report, ours, stock, "compiled")
    for mode, theirs in {"compiled": compiled[1], "eager": eager[1]}.items():
        report.goal(f"our rate compiled over diffusers' {mode}", theirs / compiled[0], at_least=AT_LEAST[mode])


def _seconds(context: Context, report: Report, ours: Case, stock: "StockCase", mode: str) -> list[float]:
    """Medians of our pair of passes and of theirs, taken in turn."""
    medians = Stopwatch(context).medians(ours.pair, stock.passes)
    for name, seconds in zip(("ours", "diffusers' DiT"), medians, strict=True):
        report.figure(f"pair of passes: {name}, {mode}", ours.samples / seconds, "samples/s")
    return medians


class StockCase:
    """diffusers' `DiTTransformer2DModel` of the size of a net of ours, and a micro-batch."""

    def __init__(self, config: DiTConfig, samples: int, device: torch.device):
        torch.manual_seed(SEED)
        with device:
            self.net: Any = stock_net(config)
        shape = (samples, config.channels, config.height, config.image_width)
        self._x, self._gradient = (torch.randn(shape, device=device) for _ in range(2))
        self._time = torch.randint(1000, (samples,), device=device)
        self._label = torch.randint(config.num_classes, (samples,), device=device)
        self._device = device

    def compile(self) -> None:
        for block in self.net.transformer_blocks:
            block.compile()

    def _forward(self) -> Tensor:
        return self.net(self._x, self._time, self._label, return_dict=False)[0]

    def passes(self) -> None:
        """One without gradient, one with, and backward."""
        self.net.zero_grad(set_to_none=True)
        with computing("bf16", self._device):
            with torch.no_grad():
                self._forward()
            out = self._forward()
        out.backward(self._gradient)


def stock_net(config: DiTConfig) -> Any:
    """With weights as they are drawn: none of its layers starts at zero."""
    assert config.height == config.image_width
    return DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.channels,
        num_layers=config.depth,
        sample_size=config.height,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
    )
