"""What the IMM step costs beyond its network passes: `python benchmarks/step.py`.

Peer: the same network's no-grad forward, forward and backward on the same inputs, measured in turn with the step in one
run. Prints ratios only; absolute times on a shared machine mean little.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.imm import InductiveMomentMatching
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.models.dit import DiT, size_config
from imm_scale.planner.flops import forward_multiply_adds

SEED = 0


class Case:
    """One network, one micro-batch, one precision."""

    def __init__(self, size: str, samples: int, particles: int, precision: str, compiled: bool):
        self.config = size_config(size)
        self.net = DiT(self.config)
        with torch.no_grad():  # a zero output layer would make the backward pass cheaper than it is
            self.net.final_layer.linear.weight.normal_(std=0.02)
        if compiled:
            self.net.compile_blocks()
        self.precision = precision
        self.flow_map = FlowMap(self.net, OTFlowMatching(), null_label=self.net.null_label)
        self.objective = InductiveMomentMatching(particles=particles, t_min=0.0, t_max=0.994, k=12)
        shape = (samples, self.config.channels, self.config.height, self.config.image_width)
        self.x = 0.5 * torch.randn(shape)
        self.label = torch.randint(self.config.num_classes, (samples,))
        self.ordinal = torch.arange(samples)
        self.times = 1000 * torch.rand(samples // particles, dtype=torch.float64)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def _forward(self) -> Tensor:
        return self.net(self.x, self.times, self.times, self.label)

    def step(self) -> None:
        """The whole of it: draws, both branches, loss, backward."""
        with self._autocast():
            loss = self.objective(self.flow_map, self.x, self.label, self.ordinal, SEED).loss_G.mean()
        loss.backward()

    def passes(self) -> None:
        """The three passes of the network, and nothing else."""
        with self._autocast():
            with torch.no_grad():
                self._forward()
            out = self._forward()
        out.backward(torch.ones_like(out))

    def loss_only(self) -> None:
        """Kernels, weights and their backward pass on outputs that are there."""
        group = self.objective.group(self.ordinal)
        s, _, t = self.objective.draw_times(self.flow_map, group, SEED)
        y_t = self.x.clone().requires_grad_()
        self.objective.discrepancy(self.flow_map, y_t, self.x + 1e-3, s, t).mean().backward()


def seconds(actions: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Times of each action, taken in turn so that a slow moment of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in actions]
    for action in actions:
        action()
    for _ in range(rounds):
        for action, taken in zip(actions, times, strict=True):
            began = time.perf_counter()
            action()
            taken.append(time.perf_counter() - began)
    return times


def ratio(above: list[float], below: list[float]) -> str:
    """Median of the pairwise ratios, with the smallest and the largest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def matmul(precision: str, size: int = 2048) -> Callable[[], None]:
    a, b = (torch.randn(size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32) for _ in range(2))
    return lambda: (a @ b, None)[1]


def report_step(args: argparse.Namespace) -> None:
    case = Case(args.size, args.samples, 4, "bf16", compiled=False)
    step, passes, loss = seconds([case.step, case.passes, case.loss_only], args.rounds)
    print(f"{args.size}, micro-batch {args.samples}, M = 4, bf16 autocast, eager")
    print(f"  IMM step / its three network passes   {ratio(step, passes)}   goal 1.03")
    print(f"  loss / IMM step                       {ratio(loss, step)}   goal 0.01")


def report_utilization(args: argparse.Namespace) -> None:
    print("achieved FLOP/s of the step over those of a 2048 matmul in the same precision")
    for precision in ("fp32", "bf16"):
        for compiled in (False, True):
            case = Case(args.size, args.samples, 4, precision, compiled)
            step, peak = seconds([case.step, matmul(precision)], args.rounds)
            work = case.objective.Config().passes.forwards * forward_multiply_adds(case.config) * args.samples / 2048**3
            shares = [work * p / s for s, p in zip(step, peak, strict=True)]
            print(f"  {precision} {'compiled' if compiled else 'eager':<9} {statistics.median(shares):.2f}")


def report_particles(args: argparse.Namespace) -> None:
    print("IMM step with M particles / with M = 4, bf16")
    sizes = (2, 4, 8, 16)
    times = seconds([Case(args.size, args.samples, m, "bf16", compiled=False).step for m in sizes], args.rounds)
    for m, taken in zip(sizes, times, strict=True):
        print(f"  M = {m:<3} {ratio(taken, times[1])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="DiT-S/2")
    parser.add_argument("--samples", type=int, default=16, help="micro-batch, a multiple of 16")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    report_step(args)
    report_particles(args)
    report_utilization(args)


if __name__ == "__main__":
    main()
