"""How much of the time the encoder of imm-scale encode is at work: reading and writing should hide behind it.

    python -m benchmarks.encode [--images 64] [--size 256]

Encodes noise of the size of photographs with a small AutoencoderKL (random weights, the real architecture) on this
machine and prints the share of time the encoder was busy.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image

from data_tools import encode, pack, records
from data_tools.common import load_pack
from imm_scale.data.codec import VAECodec

GOAL = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imm-encode-") as name:
        folder = Path(name)
        generator = np.random.default_rng(0)
        for i in range(args.images):
            path = folder / "source" / str(i % 4) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (args.size, args.size, 3), dtype=np.uint8)).save(path)
        arguments = ["--source", str(folder / "source"), "--out", str(folder / "images"), "--shard-samples", "16"]
        assert pack.main(arguments) == 0
        AutoencoderKL(
            block_out_channels=(32, 64, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=args.size,
        ).save_pretrained(str(folder / "vae"))
        codec, packed = VAECodec(str(folder / "vae")), load_pack(str(folder / "images"))
        identity = records.identify(packed, codec, flipped=False)
        todo = range(len(packed.shards))
        busy = encode.encode_shards(str(folder / "images"), str(folder / "out"), packed, codec, identity, todo, 8)
        verdict = "as it should be" if busy.share >= GOAL else f"below the goal of {GOAL:.0%}"
        print(f"the encoder was busy for {busy.share:.1%} of the time: {verdict}")


if __name__ == "__main__":
    main()
