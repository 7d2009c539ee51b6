"""Blocks along the sequence and refinement steps within each: IMM against flow matching on both axes, on one page.

    python -m experiments.two_axes [--at-once 1] [--data mnist,digits]

Trains both methods on samples in 1, 2 and 4 blocks (and digits in 8) from three seeds, measures IMM in 1, 2 and 4
steps a block and flow matching in 1 to 100, adds the runs of experiments.joint_tokens, which it makes where they are
missing, and writes docs/two_axes.md and its pictures. Run again, it goes on where it was.
"""

import argparse
from pathlib import Path

from experiments import common, digits, mnist
from experiments.joint_tokens import data as token_data
from experiments.joint_tokens.study import TASKS
from experiments.joint_tokens.study import Study as TokenStudy
from experiments.two_axes import page
from experiments.two_axes.study import DATA, Study
from imm_scale.errors import UserError


def make_data(name: str, folder: Path) -> dict[str, str]:
    """Packs and encodes what is not there yet; the config keys that name the data.

    Args:
        name: mnist or digits.
    """
    if name == "mnist":
        mnist.make_data(folder)
        return {"data.manifest": str(folder / "latents/manifest.json"), "sampling.vae": str(folder / "autoencoder")}
    digits.make_data(folder)
    return {"data.manifest": str(folder / "latents/manifest.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, each on a core (default 1)")
    parser.add_argument("--data", default=",".join(DATA), help=f"comma-separated, of {', '.join(DATA)}; default all")
    parser.add_argument("--runs", type=Path, default=Path("runs/two_axes"), help="folder of the sweeps")
    parser.add_argument("--tokens", type=Path, default=Path("runs/joint_tokens"), help="those of joint_tokens")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder the page and its pictures go to")
    args = parser.parse_args()
    try:
        names = common.chosen(args.data, DATA)
    except UserError as error:
        parser.error(str(error))
    data = []
    for name in names:
        settings = make_data(name, args.folder / name)
        data.append((DATA[name], [Study(part, args.runs, settings) for part in DATA[name].parts]))
        for study in data[-1][1]:
            study.run(args.at_once)
    tokens = TokenStudy(TASKS["digits"], args.tokens, token_data.make("digits", args.folder / "joint_tokens/digits"))
    tokens.run(args.at_once)
    print(page.write(data, tokens, args.docs))


if __name__ == "__main__":
    main()
