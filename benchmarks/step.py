"""What the IMM step costs beyond its network passes: `python -m benchmarks.step`, on CPU.

Peer: the same network's no-grad forward, forward and backward on the same inputs, measured in turn with the step in one
run. Prints ratios only; absolute times on a shared machine mean little. On a GPU: `python -m benchmarks.gpu`.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.case import Case, matmul, matmul_flops
from benchmarks.gpu.problem import wake
from benchmarks.gpu.timing import Action, ratios, seconds
from imm_scale import build
from imm_scale import config as configs
from imm_scale.config.schema import Config
from imm_scale.data.batch import Batch
from imm_scale.data.manifest import Codec, Manifest
from imm_scale.models.base import Backbone
from imm_scale.models.dit import size_config

_MATMUL = 2048
_METHODS = Path(__file__).parents[1] / "configs" / "method"
_ALIGNED, _CLASSES, _SIDE = 16, 10, 16  # groups that micro-batches are multiples of, classes, side of samples
# What presets leave to the run.
_SCHEDULE = {"method.schedule_images": 1_000_000}
_COMPLETED = dict.fromkeys(("alpha_flow", "soflow", "ect", "sct"), _SCHEDULE) | {"tvm": {"method.teacher_decay": None}}
_FORWARD_MODE = 1.9  # forwards of torch's derivative and a value beside it, over those of the one written out


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Median of the pairwise ratios, with the smallest and the largest."""
    values = ratios(above, below)
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report_step(args: argparse.Namespace) -> None:
    case = Case(size_config(args.size), args.samples, "bf16", compiled=False)
    step, passes, loss = seconds([case.step, case.passes, case.loss_only], args.rounds)
    print(f"{args.size}, micro-batch {args.samples}, M = 4, bf16 autocast, eager")
    print(f"  IMM step / its three network passes   {ratio(step, passes)}   goal 1.03")
    print(f"  loss / IMM step                       {ratio(loss, step)}   goal 0.01")


def report_utilization(args: argparse.Namespace) -> None:
    print(f"achieved FLOP/s of the step over those of a {_MATMUL} matmul in the same precision")
    for precision in ("fp32", "bf16"):
        for compiled in (False, True):
            case = Case(size_config(args.size), args.samples, precision, compiled)
            step, peak = seconds([case.step, matmul(precision, _MATMUL)], args.rounds)
            work = case.step_flops / matmul_flops(_MATMUL)
            shares = [work * share for share in ratios(peak, step)]
            print(f"  {precision} {'compiled' if compiled else 'eager':<9} {statistics.median(shares):.2f}")


def report_particles(args: argparse.Namespace) -> None:
    print("IMM step with M particles / with M = 4, bf16")
    sizes, config = (2, 4, 8, 16), size_config(args.size)
    cases = [Case(config, args.samples, "bf16", compiled=False, particles=m) for m in sizes]
    times = seconds([case.step for case in cases], args.rounds)
    for m, values in zip(sizes, times, strict=True):
        print(f"  M = {m:<3} {ratio(values, times[1])}")


def method_steps(size: str, side: int, samples: int) -> dict[str, tuple[float, Action]]:
    """{method: (forward passes that a step is counted as, a whole step in fp32)}, on one size of net and micro-batch.

    MeanFlow stands there three times: with its tangent on the quarter of samples that need one, on all of them, and on
    all of them by forward-mode differentiation.

    Args:
        side: height and width of the samples, of 4 channels.
    """
    words = {"flow_matching": ["method.name=flow_matching", "method.flow_map.second_time=none"], "imm": []}
    cases = {name: configs.load([], settings).config for name, settings in words.items()}
    cases |= {path.stem: configs.unfinished([str(path)]) for path in sorted(_METHODS.glob("*.yaml"))}
    steps: dict[str, tuple[float, Action]] = {}
    for name, case in cases.items():
        config = configs.changed(case, {"model.size": size} | _COMPLETED.get(name, {}), "method_steps")
        steps[name] = _method_step(config, side, samples, _ALIGNED)
        if name == "meanflow":
            steps["meanflow, tangent of all"] = _method_step(config, side, samples, 1)
            steps["meanflow, forward mode on all"] = _method_step(config, side, samples, 1, forward_mode=True)
    return steps


def _method_step(
    config: Config, side: int, samples: int, alignment: int, forward_mode: bool = False
) -> tuple[float, Action]:
    codec = Codec("pixels", "", side, 4, 1, (0.0,) * 4, (1.0,) * 4)
    spec = build.model_spec(config, Manifest(codec, (4, side, side), _CLASSES, (), ()))
    flow_map, method = build.net(spec), build.method(spec)
    wake(flow_map.model)
    if forward_mode:
        flow_map.model.with_tangent = partial(Backbone.with_tangent, flow_map.model)
    x, ordinal = 0.5 * torch.randn(samples, 4, side, side), torch.arange(samples)
    batch = Batch(0, x, ordinal % _CLASSES, ordinal, torch.ones(samples // method.group_size), alignment)

    def step() -> None:
        flow_map.zero_grad(set_to_none=True)
        method.loss(flow_map, batch, 0).loss_G.mean().backward()

    passes = spec.method.passes_at(alignment)
    return passes.forwards + _FORWARD_MODE * forward_mode, step


def report_methods(args: argparse.Namespace) -> None:
    """Every method's step beside flow matching's, round by round."""
    steps = method_steps(args.size, _SIDE, args.samples)
    times = seconds([step for _, step in steps.values()], args.rounds)
    base = times[list(steps).index("flow_matching")]
    print(f"{args.size}, samples of side {_SIDE}, micro-batch {args.samples}, fp32, eager:")
    print("  method                         a step over flow matching's      as counted")
    for (name, (units, _)), values in zip(steps.items(), times, strict=True):
        print(f"  {name:<30} {ratio(values, base)}   {units / 3:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="DiT-S/2")
    parser.add_argument("--samples", type=int, default=16, help="micro-batch, a multiple of 16")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    report_step(args)
    report_particles(args)
    report_methods(args)
    report_utilization(args)


if __name__ == "__main__":
    main()
