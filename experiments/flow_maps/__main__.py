"""Every flow map on one net: IMM, flow matching, MeanFlow and its kin, shortcuts, consistency models, on one page.

    python -m experiments.flow_maps [--at-once 2] [--rows imm,meanflow] [--data digits] [--full]

Trains all of them on 1,797 digits and on latents of 5,000 MNIST digits with the same net, images and number of forward
passes, each at the better of two learning rates and from three seeds; measures them in 1, 2, 4 and 8 steps; writes
docs/flow_maps.md and its pictures. About two hours of one CPU core in all; run again, it goes on where it was. --full
is the same on a wider net, eleven times as long, with four learning rates and five seeds: for a bigger machine.
"""

import argparse
from pathlib import Path

from experiments import common, digits, mnist
from experiments.flow_maps import page
from experiments.flow_maps.study import FULL, ROWS, SMALL, DataSet, Study
from imm_scale.errors import UserError

_DIGITS, _MNIST = Path("data/digits"), Path("data/mnist")
DATA = {
    "digits": DataSet(
        "digits", "1,797 digits of 8 x 8 pixels", {"data.manifest": str(_DIGITS / "latents/manifest.json")}
    ),
    "mnist": DataSet(
        "mnist",
        "4 x 8 x 8 latents of 5,000 MNIST digits",
        {
            "data.manifest": str(_MNIST / "latents/manifest.json"),
            "data.codec": "vae",
            "sampling.vae": str(_MNIST / "autoencoder"),
        },
    ),
}


def make_data(name: str) -> None:
    """Packs and encodes what is not there yet."""
    if name == "mnist":
        mnist.make_data(_MNIST)
        return
    digits.make_data(_DIGITS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side, each on a core (default 2)")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"comma-separated, of {', '.join(ROWS)}; default all")
    parser.add_argument("--data", default=",".join(DATA), help="digits, mnist or both (default)")
    parser.add_argument("--full", action="store_true", help="the long protocol")
    parser.add_argument("--runs", type=Path, default=Path("runs/flow_maps"), help="folder of the sweeps")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder the page and its pictures go to")
    args = parser.parse_args()
    try:
        rows, names = common.chosen(args.rows, ROWS), common.chosen(args.data, DATA)
    except UserError as error:
        parser.error(str(error))
    folder = args.runs / "full" if args.full else args.runs
    studies = [Study(DATA[name], FULL if args.full else SMALL, folder, rows) for name in names]
    for study in studies:
        make_data(study.data.name)
        study.run(args.at_once)
    print(page.write(studies, args.docs, "flow_maps_full" if args.full else "flow_maps"))


if __name__ == "__main__":
    main()
