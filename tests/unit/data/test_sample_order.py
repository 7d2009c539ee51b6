import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imm_scale.data import sample_order
from imm_scale.data.sample_order import Layout
from imm_scale.errors import UserError
from tests.unit.data.order import batch_indices

shard_lists = st.lists(st.integers(1, 40), min_size=1, max_size=6)
small = settings(max_examples=60, deadline=None)


@small
@given(shards=shard_lists, block=st.integers(1, 50), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_order_is_a_permutation_that_keeps_blocks_together(
    shards: list[int], block: int, seed: int, epoch: int
) -> None:
    order = sample_order.epoch_order(shards, block, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(sum(shards)))
    table = sample_order.block_table(shards, block)
    blocks = table.block_of(order)
    assert 1 + np.count_nonzero(np.diff(blocks)) == len(table.start), "each block is one run"


@small
@given(shards=shard_lists, block=st.integers(1, 50))
def test_blocks_cover_every_sample_and_never_cross_a_shard(shards: list[int], block: int) -> None:
    table = sample_order.block_table(shards, block)
    covered = [i for start, size in zip(table.start, table.size, strict=True) for i in range(start, start + size)]
    assert covered == list(range(sum(shards)))
    assert table.size.max() <= block
    shard_of = np.repeat(np.arange(len(shards)), shards)
    assert (shard_of[table.start] == shard_of[table.start + table.size - 1]).all()


@small
@given(shards=shard_lists, data=st.data())
def test_an_epoch_repeats_nothing_and_leaves_out_only_the_remainder(shards: list[int], data: st.DataObject) -> None:
    num_samples = sum(shards)
    batch = data.draw(st.integers(1, num_samples))
    order = sample_order.epoch_order(shards, 4, 1, 0)
    steps = sample_order.steps_per_epoch(batch, num_samples)
    seen = np.concatenate([batch_indices(order, batch, k, np.arange(batch)) for k in range(steps)])
    assert len(set(seen.tolist())) == len(seen) == num_samples - num_samples % batch


def test_a_position_walks_its_own_run_of_the_order() -> None:
    order = sample_order.epoch_order([64, 36], 8, seed=3, epoch=2)
    walked = [int(batch_indices(order, 10, k, np.array([4]))[0]) for k in range(10)]
    assert walked == order[40:50].tolist()


def test_epochs_and_seeds_differ_and_so_do_the_samples_left_out() -> None:
    orders = {tuple(sample_order.epoch_order([101], 8, seed, epoch)) for seed in (0, 1) for epoch in range(5)}
    assert len(orders) == 10
    assert len({order[100] for order in orders}) > 1


def test_blocks_and_samples_in_them_are_evenly_mixed() -> None:
    first_block, first_inside = np.zeros(8), np.zeros(4)
    for epoch in range(800):
        order = sample_order.epoch_order([32], 4, 0, epoch)
        first_block[order[0] // 4] += 1
        first_inside[order[0] % 4] += 1
    # Chi-square, 99.9 % quantiles at 7 and 3 degrees of freedom.
    assert ((first_block - 100) ** 2 / 100).sum() < 24.3
    assert ((first_inside - 200) ** 2 / 200).sum() < 16.3


@small
@given(steps=st.integers(0, 500), batch=st.integers(1, 20), extra=st.integers(0, 30))
def test_clock_counts_steps_through_epochs(steps: int, batch: int, extra: int) -> None:
    num_samples = batch + extra
    epoch, step = sample_order.clock(steps * batch, batch, num_samples)
    per_epoch = num_samples // batch
    assert epoch * per_epoch + step == steps and 0 <= step < per_epoch


def test_clock_refuses_what_no_step_reaches() -> None:
    with pytest.raises(UserError, match=r"images_seen 30 is not a whole number of steps of 16"):
        sample_order.clock(30, 16, 100)
    with pytest.raises(UserError, match="images_seen -16"):
        sample_order.clock(-16, 16, 100)


def test_a_data_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"99 samples.*100.*lower the batch size to 99"):
        sample_order.clock(0, 100, 99)


@small
@given(groups=st.integers(1, 200), data=st.data())
def test_ranks_partition_the_groups(groups: int, data: st.DataObject) -> None:
    world = data.draw(st.integers(1, groups))
    parts = [sample_order.rank_groups(groups, rank, world) for rank in range(world)]
    assert [g for part in parts for g in part] == list(range(groups))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == Layout(groups, 1, world, 1).slots_per_rank


@small
@given(groups=st.integers(1, 100), particles=st.integers(1, 8), data=st.data())
def test_layout_has_room_for_every_group_and_no_empty_micro_batch(
    groups: int, particles: int, data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, groups))
    micro = data.draw(st.integers(1, groups)) * particles
    layout = Layout(groups * particles, particles, world, micro)
    assert layout.num_groups == groups
    assert layout.slots == layout.accumulation * layout.slots_per_micro_batch >= layout.slots_per_rank
    assert layout.slots_per_micro_batch * particles <= micro
    assert layout.slots - layout.slots_per_rank < layout.slots_per_micro_batch
    assert layout.accumulation == -(-layout.slots_per_rank // (micro // particles)), "no more passes than needed"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((10, 4, 1, 4), r"global_batch_size is 10, not a multiple of method.particles = 4: use 8"),
        ((16, 4, 1, 6), r"micro_batch_size is 6, not a multiple of method.particles = 4: use 4"),
        ((16, 4, 1, 2), r"micro_batch_size is 2.*use 4"),
        ((16, 4, 1, 32), r"micro_batch_size 32 is larger than train.global_batch_size 16"),
        ((16, 4, 5, 4), r"5 ranks for 4 groups: at most 4 ranks fit"),
        ((16, 4, 0, 4), r"world_size is 0"),
        ((0, 4, 1, 4), r"global_batch_size is 0"),
    ],
)
def test_layout_refuses(fields: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Layout(*fields)


def test_rank_groups_refuses() -> None:
    with pytest.raises(UserError, match="at most 4 ranks fit"):
        sample_order.rank_groups(4, 0, 5)
    with pytest.raises(UserError, match="rank 2 is outside a world of 2"):
        sample_order.rank_groups(4, 2, 2)
    with pytest.raises(UserError, match="block_samples is 0"):
        sample_order.block_table([4], 0)


@small
@given(shards=shard_lists, block=st.integers(1, 50), data=st.data())
def test_a_schedule_fetches_what_each_step_needs_and_holds_nothing_longer(
    shards: list[int], block: int, data: st.DataObject
) -> None:
    """Against a walk step by step that keeps the blocks of the last step."""
    batch = data.draw(st.integers(1, sum(shards)))
    order, table = sample_order.epoch_order(shards, block, 1, 0), sample_order.block_table(shards, block)
    steps = sample_order.steps_per_epoch(batch, len(order))
    some = slice(data.draw(st.integers(0, batch - 1)), batch)
    indices = order[: batch * steps].reshape(batch, steps)[some]
    begin = data.draw(st.integers(0, steps - 1))
    schedule = sample_order.schedule(indices, table, begin)
    visits = list(zip(schedule.block.tolist(), schedule.first.tolist(), schedule.last.tolist(), strict=True))
    fetched = 0
    held: set[int] = set()
    for k in range(begin, steps):
        needed = set(table.block_of(indices[:, k]).tolist())
        fetched += len(needed - held)
        held = needed
        assert {b for b, first, last in visits if first <= k <= last} == needed
    assert len(visits) == fetched
    assert schedule.first.tolist() == sorted(schedule.first.tolist())


@small
@given(shards=shard_lists, block=st.integers(1, 50), data=st.data())
def test_order_across_worlds_micro_batches_and_resumes(shards: list[int], block: int, data: st.DataObject) -> None:
    """Any ranks and any interruption walk through the same global order, and an epoch repeats nothing."""
    num_samples = sum(shards)
    groups = data.draw(st.integers(1, num_samples))
    particles = data.draw(st.integers(1, num_samples // groups))
    batch = groups * particles
    steps = sample_order.steps_per_epoch(batch, num_samples)
    total = 2 * steps + 1

    def step_of(world: int, images_seen: int) -> list[int]:
        epoch, k = sample_order.clock(images_seen, batch, num_samples)
        order = sample_order.epoch_order(shards, block, 3, epoch)
        ranks = [sample_order.rank_groups(groups, rank, world) for rank in range(world)]
        parts = [np.arange(r.start * particles, r.stop * particles) for r in ranks]
        return [int(i) for part in parts for i in batch_indices(order, batch, k, part)]

    alone = [step_of(1, k * batch) for k in range(total)]
    stop = data.draw(st.integers(0, total))
    first, second = data.draw(st.integers(1, groups)), data.draw(st.integers(1, groups))
    resumed = [step_of(first if k < stop else second, k * batch) for k in range(total)]
    assert resumed == alone
    for epoch in (0, 1):
        seen = [i for step in alone[epoch * steps : (epoch + 1) * steps] for i in step]
        assert len(set(seen)) == len(seen) == num_samples - num_samples % batch
