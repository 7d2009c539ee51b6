"""What the second time is for: three nets of one size on the digits, how far each gets in few steps and in one jump.

    python -m experiments.second_time [--runs runs/digits] [--docs docs]

Trains what is not trained yet (IMM, the same IMM without the second time, flow matching), measures distances against
steps, and takes one jump from the same x_t to every s with each net. Writes docs/images/second_time.png and
docs/second_time.md. About half an hour of one CPU core from nothing; run again, it goes on where it was.
"""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments import common
from imm_scale.build import ModelSpec
from imm_scale.checkpoint.export import load_net
from imm_scale.data import dataset
from imm_scale.data.spaces import Latents
from imm_scale.evaluation.metrics.frechet import Moments, frechet_distance
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching, diffuse
from imm_scale.sampling.draw import STARTING_NOISE

SEED = 0
START = 0.994  # where the jumps begin: the last time IMM is trained on
LANDINGS = (0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.0)
FINE_STEPS = 128  # of the row that shows where the path of flow matching really goes
EVALUATED = (1, 2, 4, 8, 20, 100)


@dataclass(frozen=True)
class Net:
    """One of the three runs and how it is drawn."""

    recipe: str
    folder: str
    title: str
    colour: str


NETS = (
    Net("configs/digits.yaml", "imm", "IMM, told t and s", "#0072B2"),
    Net("configs/digits_without_second_time.yaml", "imm_without_second_time", "IMM, told t only", "#E69F00"),
    Net("configs/digits_flow_matching.yaml", "flow_matching", "flow matching (t only)", "#D55E00"),
)


def make_runs(runs: Path) -> None:
    """Trains and evaluates whatever is missing."""
    for net in NETS:
        folder = str(runs / net.folder)
        common.run("imm_scale", "train", net.recipe, f"run.dir={folder}")
        common.run("imm_scale", "evaluate", folder, "--steps", ",".join(map(str, EVALUATED)), "--repeats", "5")


# --- jumps ---


@torch.no_grad()
def jump(flow_map: FlowMap, x_t: Tensor, label: Tensor, s: float, t: float = START) -> Tensor:
    """f_{s,t}(x_t) for all samples, each a group of its own."""
    times = [torch.full((len(x_t),), u, dtype=torch.float64) for u in (s, t)]
    return flow_map(x_t, *times, label)


def fine_path(flow_map: FlowMap, x_t: Tensor, label: Tensor, s: float) -> Tensor:
    """Many small steps from START to s."""
    grid = torch.linspace(START, s, FINE_STEPS + 1, dtype=torch.float64).tolist()
    for t, after in itertools.pairwise(grid):
        x_t = jump(flow_map, x_t, label, after, t)
    return x_t


def marginal(manifest: str, space: Latents, s: float) -> Moments:
    """Moments of x_s = alpha_s x + sigma_s eps over the training images."""
    generator = torch.Generator().manual_seed(SEED)
    interp, moments = OTFlowMatching(), None
    for x, _ in dataset.read_all(manifest, space=space):
        eps = space.sigma_data * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x_s = diffuse(interp, x.double(), eps, torch.tensor(s, dtype=torch.float64)).flatten(1)
        moments = moments or Moments(x_s.shape[1])
        moments.add(x_s)
    assert moments is not None, "a manifest has at least one sample"
    return moments


def landing_distances(flow_map: FlowMap, spec: ModelSpec, references: dict[float, Moments]) -> list[float]:
    """Frechet distance of one jump from START to the true marginal, at every s."""
    count = next(iter(references.values())).count
    index = torch.arange(count)
    label = index % spec.space.num_classes
    x_t = spec.space.prior(SEED, STARTING_NOISE, index).double()
    values = []
    for s, reference in references.items():
        moments = Moments(len(reference.mean))
        moments.add(jump(flow_map, x_t, label, s).flatten(1).double())
        values.append(frechet_distance(moments, reference))
    return values


# --- picture and page ---


def draw(runs: Path, out: Path) -> dict[str, list[float]]:
    """The picture; returns the distances of the jumps, by net."""
    loaded = {net: load_net(str(runs / net.folder)) for net in NETS}
    spec = loaded[NETS[0]][0]
    manifest = common.config_of(str(runs / NETS[0].folder)).data.manifest
    assert manifest is not None, "a trained run has a manifest"
    references = {s: marginal(manifest, spec.space, s) for s in LANDINGS}
    jumps = {net.title: landing_distances(flow_map, spec, references) for net, (_, flow_map) in loaded.items()}
    figure = Figure(figsize=(11, 8.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    upper, lower = parts
    left, right = upper.subplots(1, 2)
    for net in NETS:
        found = common.distances(str(runs / net.folder))
        results = [found[steps] for steps in EVALUATED]
        spread = [r["std"] for r in results]
        style = {"marker": "o", "color": net.colour, "label": net.title}
        left.errorbar(EVALUATED, [r["mean"] for r in results], yerr=spread, capsize=3, **style)
        right.plot(LANDINGS, jumps[net.title], **style)
    left.set(xscale="log", yscale="log", xlabel="steps", ylabel="distance to the training images")
    left.legend(frameon=False)
    left.set_title("Sampling in few steps", loc="left")
    right.set(yscale="log", xlabel="s", ylabel="distance of where it lands to the true x_s")
    right.set_title(f"One jump from pure noise (t = {START}) to s", loc="left")
    right.invert_xaxis()
    _draw_jumps(lower, {net.title: flow_map for net, (_, flow_map) in loaded.items()}, spec)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return jumps


def _draw_jumps(figure: Figure, flow_maps: dict[str, FlowMap], spec: ModelSpec) -> None:
    """A row a net: the same noise, one jump to each s; the last row takes the path of flow matching in small steps."""
    *_, (last_title, last) = flow_maps.items()
    label = torch.tensor([3])
    x_t = spec.space.prior(SEED, STARTING_NOISE, torch.tensor([3])).double()
    rows = [(title, [jump(f, x_t, label, s) for s in LANDINGS]) for title, f in flow_maps.items()]
    fine = [fine_path(last, x_t, label, s) for s in LANDINGS]
    rows.append((f"{last_title.split(' (')[0]},\n{FINE_STEPS} small steps", fine))
    axes = figure.subplots(len(rows), len(LANDINGS) + 1)
    for row, (title, images) in zip(axes, rows, strict=True):
        for axis, z in zip(row, [x_t, *images], strict=True):
            axis.imshow(_grey(z, spec), cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=9)
    for axis, s in zip(axes[0], (START, *LANDINGS), strict=True):
        axis.set_title(f"t = {s:g}" if s == START else f"s = {s:g}", fontsize=9)


def _grey(z: Tensor, spec: ModelSpec) -> Tensor:
    images = spec.space.artifacts(None, torch.device("cpu"))(z)
    return images[0, :, :, 0]


def page(runs: Path, jumps: dict[str, list[float]]) -> str:
    """docs/second_time.md."""
    rows = []
    for net in NETS:
        found = common.distances(str(runs / net.folder))
        rows.append([net.title, *(f"{found[n]['mean']:.3f} ± {found[n]['std']:.3f}" for n in EVALUATED)])
    sampled = common.table(["net", *(common.plural(n, "step") for n in EVALUATED)], rows)
    landed = common.table(
        ["net", *(f"s = {s:g}" for s in LANDINGS)],
        [[title, *(f"{v:.3g}" for v in values)] for title, values in jumps.items()],
    )
    alone = common.distances(str(runs / NETS[1].folder))
    best = min(EVALUATED, key=lambda n: alone[n]["mean"])
    return _PAGE.format(sampled=sampled, landed=landed, start=START, fine=FINE_STEPS, best=common.plural(best, "step"))


_PAGE = """# What the second time is for

Written by `python -m experiments.second_time`; every figure is read from the runs it makes.

A sampler that takes few steps asks one question of the net: from x_t, where does the path stand at time s? A net
that is told only t cannot answer it, however it is trained: whatever s, it has one vector to give, and the jump can
only follow that vector. A net that is also told s can. The claim is easy to test: the same DiT, the same 1,797
digits, the same steps, batch and optimizer, three ways.

- *IMM, told t and s*: `configs/digits.yaml`.
- *IMM, told t only*: `configs/digits_without_second_time.yaml`, the same loss with the second time hidden from the net.
- *Flow matching (t only)*: `configs/digits_flow_matching.yaml`.

![Distance against steps, one jump to every s, and what the jumps look like](images/second_time.png)

Distance (`frechet_latents`, lower is better, mean and standard deviation over 5 sampling seeds of 1,797 images)
against steps:

{sampled}

One jump from pure noise at t = {start} straight to s, and how far what it reaches is from the true x_s = alpha_s x
+ sigma_s eps of the training images (Frechet distance in latent space):

{landed}

How to read the picture: in the last row flow matching takes {fine} small steps, so it shows where its path goes. In
one jump it only moves along the first velocity: towards the mean of the class, ever more wrong the farther it goes.

IMM without the second time learns from the same loss what one vector can do for jumps of all lengths, and that is right
for one length only. It is best in {best}; longer jumps fall short of the digit, and shorter ones do not add up to a
path: more steps make it worse, not better. Where its one length fits it may even lead, since it need be right nowhere
else. IMM with the second time is right at every length: one jump lands on a digit, and more steps do not hurt.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"), help="folder of the three runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder the page and its picture go to")
    args = parser.parse_args()
    make_runs(args.runs)
    jumps = draw(args.runs, args.docs / "images" / "second_time.png")
    (args.docs / "second_time.md").write_text(page(args.runs, jumps))
    print(args.docs / "second_time.md")


if __name__ == "__main__":
    main()
