"""What precision and compilation cost in samples: error against fp64, and Frechet distance, of the demo's trained net.

    python -m benchmarks.sampling [--steps 1,2,4,8] [--repeats 5] [--weights FILE.safetensors]

The net is that of configs/digits.yaml after its 5,000 steps (benchmarks/data/demo_imm.safetensors), the reference the
1,797 digits that come with scikit-learn: neither packed data nor a run folder is needed. Runs on a GPU if there is one.
Prints a Markdown table.
"""

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imm_scale import build, precision
from imm_scale.build import ModelSpec
from imm_scale.checkpoint import export
from imm_scale.data import codec as codecs
from imm_scale.errors import UserError
from imm_scale.evaluation.extractors import LATENTS
from imm_scale.evaluation.metrics.frechet import Moments, frechet_distance
from imm_scale.methods.flow_map import FlowMap
from imm_scale.parallel.world import World
from imm_scale.sampling.draw import Drawer, SamplingPlan, collect

DEMO_WEIGHTS = Path(__file__).parent / "data" / "demo_imm.safetensors"
DIGITS = 1797
COMPUTED = (("fp32", False), ("tf32", False), ("fp16", False), ("bf16", False), ("fp32", True), ("bf16", True))


@dataclass(frozen=True)
class Error:
    """Mean over samples of |z - z_fp64| / |z_fp64|, and its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Frechet:
    """Mean over seeds of the distance to the digits, its standard deviation, and each value."""

    mean: float
    std: float
    values: tuple[float, ...]


def load(file: str | Path = DEMO_WEIGHTS, device: str | torch.device = "cpu") -> tuple[ModelSpec, FlowMap]:
    """The trained net, ready to draw from."""
    spec, flow_map = export.load_net(str(file))
    return spec, flow_map.to(device)


def plan(spec: ModelSpec, steps: int, name: str = "fp32", compiled: bool = False, seed: int = 0) -> SamplingPlan:
    """As many samples as there are digits, as `imm-scale evaluate` draws them."""
    return SamplingPlan(
        steps=steps,
        grid=build.method(spec).default_grid(steps),
        labels=tuple(range(spec.space.num_classes)),
        num=DIGITS,
        seed=seed,
        precision=name,
        compile=compiled,
    )


def draw(flow_map: FlowMap, spec: ModelSpec, chosen: SamplingPlan) -> Tensor:
    """(num, C, H, W) fp64 samples on the CPU."""
    drawer = Drawer(flow_map, spec, chosen)
    return torch.cat([drawer.draw(*batch)[2] for batch in chosen.batches])


def in_fp64(flow_map: FlowMap, spec: ModelSpec, chosen: SamplingPlan) -> Tensor:
    """The same samples, weights and every operation in fp64, on the CPU."""
    reference = copy.deepcopy(flow_map).double().cpu()
    return draw(reference, spec, dataclasses.replace(chosen, precision="fp32", compile=False))


def error_against_fp64(flow_map: FlowMap, spec: ModelSpec, chosen: SamplingPlan, exact: Tensor | None = None) -> Error:
    """How far samples are from those of `in_fp64`.

    Args:
        exact: these, where they are known already.
    """
    exact = in_fp64(flow_map, spec, chosen) if exact is None else exact
    difference = (draw(flow_map, spec, chosen) - exact).flatten(1).norm(dim=1)
    relative = difference / exact.flatten(1).norm(dim=1)
    return Error(relative.mean().item(), relative.std().item() / len(relative) ** 0.5)


def digits(spec: ModelSpec) -> Moments:
    """Moments of scikit-learn's digits on the scale the net works on."""
    from sklearn.datasets import load_digits

    images = np.round(load_digits().images * 255 / 16).astype(np.uint8)  # as `data_tools.pack` makes them, fp16 latents
    stored = codecs.PixelsCodec().encode(torch.from_numpy(images)[..., None]).half()
    z = codecs.normalize(stored, spec.space.codec.mean, spec.space.codec.std, spec.space.sigma_data)
    return moments(z)


def moments(z: Tensor) -> Moments:
    features = LATENTS(z).features
    accumulated = Moments(features.shape[1])
    accumulated.add(features)
    return accumulated


def frechet(flow_map: FlowMap, spec: ModelSpec, chosen: SamplingPlan, reference: Moments, repeats: int = 5) -> Frechet:
    """`frechet_latents` over seeds from chosen.seed on: what `imm-scale evaluate` measures of the demo."""
    values = [
        frechet_distance(moments(collect(flow_map, spec, dataclasses.replace(chosen, seed=seed), World())), reference)
        for seed in range(chosen.seed, chosen.seed + repeats)
    ]
    return Frechet(statistics.fmean(values), statistics.stdev(values) if repeats > 1 else 0.0, tuple(values))


def possible(name: str, compiled: bool) -> str:
    """Why this machine cannot compute so, "" if it can."""
    if name == "tf32" and not torch.cuda.is_available():
        return "tf32 is fp32 on a CPU"
    try:
        precision.check(name, "precision")
        if compiled:
            precision.check_compiler("compile")
    except UserError as error:
        return str(error)
    return ""


def report(spec: ModelSpec, flow_map: FlowMap, steps: Sequence[int], repeats: int) -> None:
    """A line for each step count and way to compute, as it is measured."""
    reference = digits(spec)
    print(f"| steps | computed | error against fp64 | frechet_latents, {repeats} seeds | off fp32's, paired |")
    print("|---|---|---|---|---|")
    for count in steps:
        exact = in_fp64(flow_map, spec, plan(spec, count))
        base = frechet(flow_map, spec, plan(spec, count), reference, repeats)
        for name, compiled in COMPUTED:
            chosen = plan(spec, count, name, compiled)
            why = possible(name, compiled)
            if why:
                print(f"| {count} | {label(name, compiled)} | skipped: {why} | | |", flush=True)
                continue
            error = error_against_fp64(flow_map, spec, chosen, exact)
            distance = frechet(flow_map, spec, chosen, reference, repeats)
            print(f"| {count} | {label(name, compiled)} | {_shown(error)} | {_beside(distance, base)} |", flush=True)


def label(name: str, compiled: bool) -> str:
    return name + (" compiled" if compiled else " eager")


def _shown(error: Error) -> str:
    return f"{error.mean:.2e} ± {error.standard_error:.0e}"


def _beside(distance: Frechet, base: Frechet) -> str:
    """The distance, and its mean difference to another on the same seeds, with the standard error of that."""
    pairs = [a - b for a, b in zip(distance.values, base.values, strict=True)]
    spread = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
    return f"{distance.mean:.4f} ± {distance.std:.4f} | {statistics.fmean(pairs):+.1e} ± {spread:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="1,2,4,8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--weights", default=str(DEMO_WEIGHTS))
    args = parser.parse_args()
    precision.set_tf32(False)
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec, flow_map = load(args.weights, device)
    report(spec, flow_map, [int(count) for count in args.steps.split(",")], args.repeats)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"\n{name}, torch {torch.__version__}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
