"""A network, a micro-batch, a precision: what a training step computes, whole and in parts."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.problem import PARTICLES, wake
from benchmarks.gpu.report import Context
from benchmarks.gpu.timing import CPU, Action
from imm_scale.data.batch import Batch
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.imm import ImmConfig, InductiveMomentMatching
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.models.dit import DiT, DiTConfig, size_config
from imm_scale.planner.flops import forward_multiply_adds
from imm_scale.precision import HALF, computing

SEED = 0
_SMALL: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "height": 8, "image_width": 8, "num_classes": 10}


def net_config(context: Context, size: str) -> DiTConfig:
    """The row of the size table; cut down at size `small`."""
    config = size_config(size)
    return replace(config, **_SMALL) if context.small else config


def make_net(config: DiTConfig, device: torch.device) -> DiT:
    """With no layer at zero: behind adaLN-Zero's gates a GPU would multiply zeros, at less power and a higher clock."""
    torch.manual_seed(SEED)
    with device:
        return wake(DiT(config))


class Case:
    """One network, one micro-batch, one precision, on one device.

    Args:
        samples: of the micro-batch, a multiple of `particles`.
    """

    def __init__(
        self,
        config: DiTConfig,
        samples: int,
        precision: str,
        compiled: bool,
        device: torch.device = CPU,
        particles: int = PARTICLES,
    ):
        self.config, self.samples, self.precision, self.device = config, samples, precision, device
        self.net = make_net(config, device)
        if compiled:
            self.net.compile_blocks()
        self.flow_map = FlowMap(self.net, OTFlowMatching(), null_label=self.net.null_label)
        self.method = InductiveMomentMatching(ImmConfig(particles=particles).resolved("fp32"))
        shape = (samples, config.channels, config.height, config.image_width)
        self.x = 0.5 * torch.randn(shape, device=device)
        self.label = torch.randint(config.num_classes, (samples,), device=device)
        self.ordinal = torch.arange(samples, device=device)
        self.batch = Batch(0, self.x, self.label, self.ordinal, torch.ones(samples // particles, device=device))
        self.times = 1000 * torch.rand(samples // particles, dtype=torch.float64, device=device)
        self._s, _, self._t = self.method.draw_times(self.flow_map, self.method.group(self.ordinal), SEED)
        self._output, self._gradient = torch.randn(shape, device=device), torch.randn(shape, device=device)

    @property
    def step_flops(self) -> float:
        """What the model needs for a step: four forwards' worth, a multiply-add counted twice."""
        return 2.0 * self.method.passes.forwards * forward_multiply_adds(self.config) * self.samples

    def _forward(self) -> Tensor:
        return self.net(self.x, self.times, self.times, self.label)

    def step(self) -> None:
        """The whole of it: draws, both branches, loss, backward."""
        self.net.zero_grad(set_to_none=True)
        with computing(self.precision, self.device):
            loss = self.method.loss(self.flow_map, self.batch, SEED).loss_G.mean()
        loss.backward()

    def passes(self) -> None:
        """The three passes of the network, and nothing else."""
        self.net.zero_grad(set_to_none=True)
        with computing(self.precision, self.device):
            with torch.no_grad():
                self._forward()
            out = self._forward()
        out.backward(self._gradient)

    def pair(self) -> None:
        """The same passes as a step runs them, both branches together."""
        self.net.zero_grad(set_to_none=True)
        with computing(self.precision, self.device):
            times = self.times, self.times, self.times, self.times
            out, _ = self.net.pair(self.x, self.x, *times, self.label)
        out.backward(self._gradient)

    def draws(self) -> None:
        """All that is random about a micro-batch, and both branches' samples."""
        self.method.draw(self.flow_map, self.x, self.label, self.ordinal, SEED)

    def loss_only(self) -> None:
        """Kernels, weights and their backward pass on outputs that are there."""
        y_t = self._output.detach().requires_grad_()
        self.method.discrepancy(self.flow_map, y_t, self.x, self._s, self._t).mean().backward()


def matmul(precision: str, size: int, device: torch.device = CPU) -> Action:
    """A product of two random square matrices: on ones or zeros a GPU draws less power and runs faster."""
    dtype = HALF.get(precision, torch.float32)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return lambda: torch.mm(a, b)


def matmul_flops(size: int) -> float:
    return 2.0 * size**3
