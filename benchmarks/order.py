"""What the order of samples costs and how well it mixes, for ImageNet's 1,281,167 samples in 92 shards.

python -m benchmarks.order [--batch 4096] [--block 32]
"""

import argparse

import numpy as np

from benchmarks import mixing
from imm_scale.data import sample_order

SAMPLES, SHARDS = 1_281_167, 92


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--block", type=int, default=32)
    args = parser.parse_args()
    shards = [len(part) for part in np.array_split(np.empty(SAMPLES), SHARDS)]
    table = sample_order.block_table(shards, args.block)
    first, second = (sample_order.epoch_order(shards, args.block, 0, epoch) for epoch in (0, 1))
    for world in (8, 64, 1024):
        amplification = mixing.read_amplification(first, table, args.batch, world)
        print(f"{world:5d} ranks: {amplification:.4f} bytes fetched per byte used, in an epoch")
    shard_of = np.repeat(np.arange(SHARDS), shards)
    class_of = np.random.default_rng(0).integers(0, 1000, SAMPLES)
    for name, groups in (("shards", shard_of), ("classes", class_of)):
        mixture = mixing.mixture(first, args.batch, groups)
        print(f"{name} in a batch: {mixture.groups:.1f}, full shuffle {mixture.groups_shuffled:.1f}")
    for window in (1, args.block):
        again = mixing.meeting_again(first, second, args.batch, window)
        print(f"samples that met within {window} steps meet again {again:.4f} times as often as under a full shuffle")


if __name__ == "__main__":
    main()
