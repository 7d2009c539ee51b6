"""docs/quickstart.md, typed as it stands: own pictures of any sizes to a trained net, a picture and a number."""

import re
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from tests import ranks

ROOT = Path(__file__).parents[2]
# What is cut down for the test, and to what: steps of training, and samples of each measurement.
SMALLER = {
    "train.max_steps=4000": "train.max_steps=2 train.global_batch_size=16 train.micro_batch_size=16 ema.decays=[0.5]",
    "--num 500": "--num 65",
}


def _commands() -> str:
    page = (ROOT / "docs" / "quickstart.md").read_text()
    (block,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for typed, fewer in SMALLER.items():
        assert typed in block
        block = block.replace(typed, fewer)
    return block


def _pictures(folder: Path) -> None:
    """Three classes of pictures in several sizes, modes and formats."""
    rng = np.random.default_rng(0)
    for label in ("cats", "dogs", "two words"):
        (folder / label).mkdir(parents=True)
        for i in range(24):  # 72 pictures, more than the 64 numbers they are compared by
            height, width = rng.integers(20, 90, 2)
            mode, suffix = [("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("RGB", "webp")][i % 4]
            channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
            pixels = rng.integers(0, 256, (height, width, *channels), dtype=np.uint8)
            Image.fromarray(pixels, mode).save(folder / label / f"picture {i}.{suffix}")


def _words(script: str) -> list[list[str]]:
    """The words of each `imm-scale` of a script, as bash would hand them over."""
    noting = 'imm-scale() { printf "%s\\0" "$@"; printf "\\n\\0"; }\nset -e\n'
    done = subprocess.run(["bash", "-c", noting + script], text=True, capture_output=True, check=True)
    assert done.stderr == ""
    return [command.split("\0")[:-1] for command in done.stdout.split("\n\0")[:-1]]


def test_a_newcomers_ten_minutes(tmp_path):
    _pictures(tmp_path / "my_images")
    printed = ""
    commands = _words(_commands())
    assert [words[0] for words in commands] == ["pack", "encode", "train", "train", "sample", "evaluate", "report"]
    for words in commands:
        code, output = ranks.typed(tmp_path, *words)
        assert code == 0, output
        printed += output
    sheets = sorted(path.name for path in tmp_path.glob("runs/mine/samples/*/*.png"))
    assert sheets == ["steps-1.png", "steps-2.png", "steps-4.png"]
    for sheet in tmp_path.glob("runs/mine/samples/*/*.png"):
        assert np.asarray(Image.open(sheet)).std() > 0
    numbers = re.findall(r"^frechet_latents +([124]) steps? +\d+\.\d+ \+- \d+\.\d+ +\(3 x 65 samples\)", printed, re.M)
    assert numbers == ["1", "2", "4"]
    assert "features: their cov" not in printed, "65 samples are enough for 64 numbers, as 500 are"
    page = (tmp_path / "mine.html").read_text()
    assert page.count("data:image/png;base64,") >= 3
    assert "frechet_latents" in page
