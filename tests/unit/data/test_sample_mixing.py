import numpy as np
import pytest

from benchmarks import mixing
from imm_scale.data import sample_order

N, BATCH, BLOCK = 160_000, 512, 32
SHARDS = [8000] * 20


@pytest.fixture(scope="module")
def orders() -> list[np.ndarray]:
    return [sample_order.epoch_order(SHARDS, BLOCK, 0, epoch) for epoch in (0, 1)]


def test_a_full_shuffle_measures_as_one() -> None:
    first, second = (np.random.default_rng(seed).permutation(N) for seed in (1, 2))
    assert abs(mixing.meeting_again(first, second, BATCH) - 1) < 0.02
    same = mixing.meeting_again(first, first, BATCH)
    assert abs(same / (N / BATCH) - 1) < 0.02


def test_batches_mix_like_a_full_shuffle(orders: list[np.ndarray]) -> None:
    """In one batch a position's block has one sample, so neighbours on storage meet no more often than others."""
    shard_of = np.repeat(np.arange(20), 8000)
    mixture = mixing.mixture(orders[0], BATCH, shard_of)
    assert mixture.groups == mixture.groups_shuffled == 20
    classes = np.random.default_rng(0).integers(0, 1000, N)
    mixture = mixing.mixture(orders[0], BATCH, classes)
    assert abs(mixture.groups / mixture.groups_shuffled - 1) < 0.02
    assert abs(mixing.meeting_again(*orders, BATCH) - 1) < 0.05


def test_what_the_blocks_cost_is_seen_in_a_window(orders: list[np.ndarray]) -> None:
    """Samples of a block stay within 32 steps of each other in every epoch: 31 of them among 16,384 met."""
    # Pairs in a window of 32 steps: 16383 per sample by chance at 16384 / N each; the block adds about 31 / 2.
    expected = 1 + 31 * (1 / 2) / (16384 * 16384 / N)
    ratio = mixing.meeting_again(*orders, BATCH, window=32)
    assert 1.0 < ratio < 1 + 2 * (expected - 1)


@pytest.mark.parametrize("world", [1, 8, 64, 512])
def test_amplification_is_one_block_per_seam(world: int, orders: list[np.ndarray]) -> None:
    table = sample_order.block_table(SHARDS, BLOCK)
    amplification = mixing.read_amplification(orders[0], table, BATCH, world)
    # 312 samples a position, 32 a block: seams that fall inside a block (3 of 4) cost one more block.
    assert abs(amplification - (1 + 0.75 * 32 / 312)) < 0.01
