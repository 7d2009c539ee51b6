"""The digits of scikit-learn as pixels: the smallest data set of the comparisons."""

from pathlib import Path

from experiments import common


def make_data(folder: Path) -> None:
    """Packs and encodes what is not there yet: images and latents below the folder."""
    images, latents = str(folder / "images"), str(folder / "latents")
    common.run("data_tools.pack", "--source", "digits", "--out", images)
    common.run("data_tools.encode", "--images", images, "--out", latents, "--codec", "pixels")
