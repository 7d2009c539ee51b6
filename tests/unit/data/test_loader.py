import gc
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from imm_scale import devices, rng, storage
from imm_scale.data import codec as codecs
from imm_scale.data import loader as loaders
from imm_scale.data import sample_order
from imm_scale.data.batch import BufferPool
from imm_scale.data.dataset import Dataset, read_all
from imm_scale.data.loader import Batch, Loader, Reading
from imm_scale.data.manifest import Codec, Manifest
from imm_scale.data.prefetch import Prefetcher
from imm_scale.data.sample_order import Layout
from imm_scale.data.shards import write_shard
from imm_scale.errors import UserError
from tests import ranks
from tests.transfers import Transfers
from tests.unit.data.order import batch_indices

MakeDataset = Callable[..., str]
BATCH, PARTICLES, SEED, BLOCK = 20, 2, 5, 4


def _batches(url: str, steps: int, world: int = 1, micro: int = BATCH, rank: int = 0, **options: object) -> list[Batch]:
    layout = Layout(BATCH, PARTICLES, world, micro)
    with Loader(url, layout, rank, SEED, BLOCK, **options) as loader:  # type: ignore[arg-type]
        return list(islice(loader, steps))


def _sample_index(x_NCHW: Tensor, url: str) -> list[int]:
    """Undoes the normalization and reads the index that make_dataset put into the first value of pixels."""
    codec = Manifest.load(url).codec
    return (codecs.denormalize(x_NCHW, codec.mean, codec.std)[:, 0, 0, 0] * 64).round().int().tolist()


def test_batches_are_those_of_the_plan_across_epochs(make_dataset: MakeDataset) -> None:
    url = make_dataset([30, 7, 31])
    steps = 68 // BATCH
    for i, batch in enumerate(_batches(url, 2 * steps + 1)):
        order = sample_order.epoch_order([30, 7, 31], BLOCK, SEED, i // steps)
        expected = batch_indices(order, BATCH, i % steps, np.arange(BATCH)).tolist()
        assert _sample_index(batch.x, url) == expected
        assert batch.condition.tolist() == [index % 7 for index in expected]
        assert batch.images_seen == i * BATCH
        assert batch.ordinal.tolist() == list(range(i * BATCH, (i + 1) * BATCH))
        assert batch.x.dtype == torch.float32 and batch.weight.tolist() == [1.0] * (BATCH // PARTICLES)


def _real_rows(batch: Batch) -> dict[int, tuple[Tensor, int]]:
    real = batch.weight.repeat_interleave(PARTICLES) > 0
    padded = ~real
    assert not batch.x[padded].any() and not batch.condition[padded].any() and not batch.ordinal[padded].any()
    rows = zip(batch.ordinal[real].tolist(), batch.x[real], batch.condition[real].tolist(), strict=True)
    return {ordinal: (x, label) for ordinal, x, label in rows}


@pytest.mark.parametrize("kind", ["pixels", "vae"])
@pytest.mark.parametrize(("world", "micro"), [(1, 6), (2, 8), (3, 2), (3, 4), (7, 20), (10, 2)])
def test_any_layout_gives_the_same_samples(make_dataset: MakeDataset, kind: str, world: int, micro: int) -> None:
    url = make_dataset([30, 30], kind=kind)
    steps = 4
    expected: dict[int, tuple[Tensor, int]] = {}
    for batch in _batches(url, steps):
        expected |= _real_rows(batch)
    layout = Layout(BATCH, PARTICLES, world, micro)
    joined: dict[int, tuple[Tensor, int]] = {}
    for rank in range(world):
        for batch in _batches(url, steps, world, micro, rank):
            assert len(batch.weight) == layout.slots
            for part in batch.micro_batches(layout.accumulation):
                assert len(part.weight) == layout.slots_per_micro_batch
                assert len(part.x) == layout.slots_per_micro_batch * PARTICLES <= micro
                rows = _real_rows(part)
                assert not joined.keys() & rows.keys()
                joined |= rows
    assert joined.keys() == expected.keys() == set(range(steps * BATCH))
    for ordinal, (x, label) in expected.items():
        assert torch.equal(joined[ordinal][0], x) and joined[ordinal][1] == label


@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_resume_continues_at_the_next_sample(make_dataset: MakeDataset, start: int) -> None:
    url = make_dataset([30, 37], kind="vae")
    whole = _batches(url, 6)
    resumed = _batches(url, 6 - start, images_seen=start * BATCH)
    for expected, batch in zip(whole[start:], resumed, strict=True):
        assert batch.images_seen == expected.images_seen
        assert torch.equal(batch.x, expected.x) and torch.equal(batch.condition, expected.condition)


def test_vae_batches_draw_the_posterior_by_ordinal(make_dataset: MakeDataset) -> None:
    url = make_dataset([40], kind="vae")
    batch = _batches(url, 1)[0]
    order = sample_order.epoch_order([40], BLOCK, SEED, 0)
    indices = batch_indices(order, BATCH, 0, np.arange(BATCH))
    stored = torch.from_numpy(Dataset(url).read(0, 40))[torch.from_numpy(indices)].float()
    raw = stored[:, :2] + stored[:, 2:] * rng.normal(SEED, "posterior", batch.ordinal, (2, 3, 3))
    torch.testing.assert_close(batch.x[:, 1], (raw[:, 1] - 0.25) / 1.5 * 0.5)


@pytest.mark.parametrize("kind", ["pixels", "vae"])
def test_batches_are_drawn_and_normalized_on_their_device(make_dataset: MakeDataset, kind: str) -> None:
    """The meta device stands for a GPU: torch refuses to mix its tensors with those of the CPU."""
    url = make_dataset([40], kind=kind)
    with Loader(url, Layout(BATCH, PARTICLES, 3, 8), 0, SEED, BLOCK, device="meta") as loader:
        for _ in range(3):
            with Transfers() as seen:
                batch = next(loader)
            assert {t.device.type for t in (batch.x, batch.condition, batch.ordinal, batch.weight)} == {"meta"}
            assert (
                batch.x.shape == (8, 2, 3, 3)
                and batch.x.dtype == torch.float32
                and batch.condition.dtype == torch.int64
            )
            # Latents and labels, and nothing that waits.
            assert seen.copies == [("cpu", "meta", True)] * 2 and not seen.reads


def test_the_thread_that_pins_memory_has_chosen_its_gpu_first(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, events = make_dataset([40]), []

    def note(event: str) -> None:
        events.append((threading.current_thread().name, event))

    def noting_pins(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: object, pin_memory: bool = False, **options: object) -> Tensor:
            if pin_memory:
                note("pinned")
            return make(*args, **options)

        return wrapper

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: note(f"{device} chosen"))
    monkeypatch.setattr(torch, "empty", noting_pins(torch.empty))
    monkeypatch.setattr(torch, "zeros", noting_pins(torch.zeros))
    monkeypatch.setattr(loaders, "BatchMaker", lambda *args: None)  # there is no such device to make batches on
    with Loader(url, Layout(BATCH, PARTICLES, 1, BATCH), 0, SEED, BLOCK, device="cuda:3") as loader:
        next(loader._prefetcher)
    assert events[0] == ("prefetch_0", "cuda:3 chosen")
    assert set(events[1:]) == {("prefetch_0", "pinned")} and len(events) % 2 == 1, "latents and labels of each batch"


def test_flip_mirrors_half_of_the_pixels_by_ordinal(make_dataset: MakeDataset) -> None:
    url = make_dataset([100])
    plain, flipped = _batches(url, 5), _batches(url, 5, flip=True)
    count = 0
    for a, b in zip(plain, flipped, strict=True):
        mirrored = rng.uniform(SEED, "flip", a.ordinal)[:, 0] < 0.5
        count += int(mirrored.sum())
        assert torch.equal(b.x[mirrored], a.x[mirrored].flip(-1)) and torch.equal(b.x[~mirrored], a.x[~mirrored])
    assert 30 < count < 70
    with pytest.raises(UserError, match=r"data\.flip needs pixels"):
        _batches(make_dataset([40], kind="vae"), 1, flip=True)


def test_a_block_is_read_once_and_memory_is_bounded(make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    url = make_dataset([400, 400])
    reads: list[tuple[str, int]] = []
    read_into = storage.read_into

    def counting(url: str, start: int, buffer: memoryview, on_retry: object) -> int:
        reads.append((url, start))
        return read_into(url, start, buffer)

    monkeypatch.setattr(storage, "read_into", counting)
    _batches(url, 37)  # 40 steps make an epoch, three are read ahead at the most
    # 200 blocks of 4; a block at a seam of two of the 20 positions is read twice.
    assert len(set(reads)) <= 200 and len(reads) <= 220


def test_start_is_refused_for_bad_data_and_arguments(make_dataset: MakeDataset) -> None:
    url = make_dataset([12, 13])
    with pytest.raises(UserError, match="images_seen 30"):
        _batches(url, 1, images_seen=30)
    with pytest.raises(UserError, match="rank 4 is outside"):
        _batches(url, 1, world=3, rank=4)
    with pytest.raises(UserError, match=r"19 samples.*lower the batch size"):
        _batches(make_dataset([19]), 1)
    shard = Path(url).parent / "part-001.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])
    with pytest.raises(UserError, match=r"part-001\.tar.*cut short"):
        _batches(url, 1)
    shard.unlink()
    with pytest.raises(UserError, match=r"part-001\.tar.*missing"):
        _batches(url, 1)


def test_damage_met_in_the_background_reaches_the_consumer(make_dataset: MakeDataset) -> None:
    url = make_dataset([60])
    shard = Path(url).parent / "part-000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"part-000\.tar: sample 0 at byte 512 has crc32"):
        _batches(url, 3)


def _prefetch_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("prefetch")}


def test_closing_ends_the_thread(make_dataset: MakeDataset) -> None:
    url = make_dataset([40])
    before = _prefetch_threads()
    with Loader(url, Layout(BATCH, PARTICLES, 1, BATCH), 0, SEED, BLOCK) as loader:
        next(loader)
        assert _prefetch_threads() - before
        assert loader.data_seconds > 0
    assert not _prefetch_threads() - before


def test_prefetcher_runs_ahead_by_its_depth_and_no_further() -> None:
    produced: list[int] = []

    def numbers() -> Iterator[int]:
        for i in range(100):
            produced.append(i)
            yield i
        raise OSError("the end")

    prefetcher = Prefetcher(numbers(), depth=2)
    taken = [next(prefetcher) for _ in range(10)]
    prefetcher.close()
    assert taken == list(range(10)) and 10 <= len(produced) <= 12
    with pytest.raises(OSError, match="the end"):
        list(Prefetcher(numbers(), depth=2))


@pytest.mark.filterwarnings("error")
def test_read_all_gives_every_sample_in_order(make_dataset: MakeDataset) -> None:
    url = make_dataset([10, 11])
    chunks = list(read_all(url, chunk_samples=4))
    assert max(len(x) for x, _ in chunks) == 4
    x, label = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    assert _sample_index(x, url) == list(range(21)) and label.tolist() == [i % 7 for i in range(21)]
    vae = make_dataset([10, 11], kind="vae")
    small, large = (torch.cat([x for x, _ in read_all(vae, n)]) for n in (3, 256))
    assert torch.equal(small, large) and small.shape == (21, 2, 3, 3)


def test_neighbours_are_read_together(make_dataset: MakeDataset) -> None:
    with Loader(make_dataset([400]), Layout(BATCH, PARTICLES, 1, BATCH), 0, SEED, BLOCK) as loader:
        next(loader)
        # 36 slots of 100 blocks: some lie side by side, and of those some are read as one.
        assert loader.counters["requests"] < 36
        assert loader.counters["bytes"] > 0 and loader.counters["retries"] == 0


def _damage(url: str, shard: str, sample: int) -> None:
    path = Path(url).parent / f"{shard}.tar"
    index = np.load(path.with_suffix(".index.npy"))
    data = bytearray(path.read_bytes())
    data[index["offset"][sample] + 140] ^= 4
    path.write_bytes(data)


def test_a_bad_block_is_replaced_alike_on_every_rank(
    make_dataset: MakeDataset, caplog: pytest.LogCaptureFixture
) -> None:
    url = make_dataset([60, 40])
    clean = {k: v for batch in _batches(url, 5) for k, v in _real_rows(batch).items()}
    _damage(url, "part-000", 6)
    with pytest.raises(UserError, match=r"part-000\.tar: block 1 \(samples 4 to 7\) cannot be read.*crc32.*--repair"):
        _batches(url, 5)
    skipping = Reading(on_bad_block="skip")
    rows: dict[int, tuple[Tensor, int]] = {}
    for rank in range(2):
        layout = Layout(BATCH, PARTICLES, 2, BATCH)
        with Loader(url, layout, rank, SEED, BLOCK, reading=skipping) as loader:
            for batch in islice(loader, 5):
                rows |= _real_rows(batch)
    alone = {k: v for batch in _batches(url, 5, reading=skipping) for k, v in _real_rows(batch).items()}
    assert rows.keys() == alone.keys() == clean.keys()
    changed = [k for k in clean if not torch.equal(alone[k][0], clean[k][0])]
    assert len(changed) == 4, "the four samples of the block"
    assert all(torch.equal(rows[k][0], alone[k][0]) and rows[k][1] == alone[k][1] for k in rows)
    for x, label in alone.values():
        assert _sample_index(x[None], url)[0] % 7 == label
    assert "stand in" in caplog.text
    _damage(url, "part-001", 30)
    with pytest.raises(UserError, match=r"2 of 25 blocks are bad, data\.on_bad_block=skip allows 1"):
        _batches(url, 5, reading=skipping)


def test_mirrored_latents_are_chosen_by_ordinal(tmp_path: Path) -> None:
    stored = np.abs(np.random.default_rng(0).standard_normal((40, 4, 3, 3))).astype(np.float16)
    shard = write_shard(str(tmp_path), "a.tar", [str(i) for i in range(40)], stored, [0] * 40, stored + 1)
    codec = Codec("vae", "ab" * 32, 24, 2, 8, (0.0, 0.0), (1.0, 1.0))
    url = str(tmp_path / "manifest.json")
    Manifest(codec, (2, 3, 3), 1, (), (shard,), flipped=True).save(url)
    plain, flipped = _batches(url, 2), _batches(url, 2, flip=True)
    for a, b in zip(plain, flipped, strict=True):
        mirrored = rng.uniform(SEED, "flip", a.ordinal)[:, 0] < 0.5
        assert torch.equal(b.x[~mirrored], a.x[~mirrored]) and mirrored.any()
        noise = rng.normal(SEED, "posterior", a.ordinal, (2, 3, 3))
        # Mean and std are both larger by one in the mirrored latent, up to fp16 rounding.
        torch.testing.assert_close(b.x[mirrored], (a.x + 0.5 * (1 + noise))[mirrored], atol=5e-3, rtol=0)


def test_a_cache_serves_the_second_run(make_dataset: MakeDataset, tmp_path: Path) -> None:
    url = make_dataset([100, 60])
    reading = Reading(cache_dir=str(tmp_path / "cache"), cache_bytes=1 << 20)
    first = _batches(url, 16, reading=reading)
    layout = Layout(BATCH, PARTICLES, 1, BATCH)
    with Loader(url, layout, 0, SEED, BLOCK, reading=reading) as loader:
        second = list(islice(loader, 16))
        assert loader.counters["requests"] == 0 and loader.counters["cache_hits"] >= 40
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, second, strict=True))
    for entry in (tmp_path / "cache").glob("*.block"):
        data = bytearray(entry.read_bytes())
        data[140] ^= 1
        entry.write_bytes(data)
    with Loader(url, layout, 0, SEED, BLOCK, reading=reading) as loader:
        third = list(islice(loader, 16))
        assert loader.counters["damaged_reads"] >= 40 and loader.counters["requests"] >= 40
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, third, strict=True))


def test_memory_stays_within_the_stated_bound(make_dataset: MakeDataset) -> None:
    url = make_dataset([2000], channels=4, side=32)
    tracemalloc.start()
    try:
        with Loader(url, Layout(64, 2, 1, 64), 0, SEED, 32) as loader:
            for _ in islice(loader, 60):
                held = tracemalloc.get_traced_memory()[0]
                assert held < loader.memory_bound_bytes  # numpy reports its arrays to tracemalloc
            assert loader.memory_bound_bytes < 80 * 32 * 8192 + 2 * (4 << 20) + 3 * 64 * 3 * 8192 + 10_000 * 8
    finally:
        tracemalloc.stop()


def _seen(url: str, world: int, start: int, steps: int) -> dict[int, bytes]:
    """In a process of its own: this rank's samples by ordinal."""
    rank = int(os.environ["RANK"])
    layout = Layout(BATCH, PARTICLES, world, BATCH)
    with Loader(url, layout, rank, SEED, BLOCK, images_seen=start * BATCH) as loader:
        rows = [_real_rows(batch) for batch in islice(loader, steps)]
    return {ordinal: x.numpy().tobytes() + bytes([label]) for row in rows for ordinal, (x, label) in row.items()}


def test_two_ranks_then_one_then_four(make_dataset: MakeDataset) -> None:
    url = make_dataset([30, 41, 12], kind="vae")
    expected = ranks.run(_seen, 1, url, 1, 0, 12)[0]
    all_rows: dict[int, bytes] = {}
    for world, start, steps in ((2, 0, 3), (1, 3, 4), (4, 7, 5)):
        for rows in ranks.run(_seen, world, url, world, start, steps):
            assert not rows.keys() & all_rows.keys()
            all_rows |= rows
    assert all_rows == expected and len(all_rows) == 12 * BATCH


def test_kept_batches_stay_and_dropped_ones_are_used_again() -> None:
    pool = BufferPool((3, 2), np.float32)
    first = pool.take()
    part = first.fill_(1.0)[1:].split(1)[1]
    address = first.data_ptr()
    del first
    assert pool.take().data_ptr() != address and part.tolist() == [[1.0, 1.0]]
    del part
    gc.collect()
    addresses = {tensor.data_ptr() for tensor in [pool.take(), pool.take()]}
    assert address in addresses


def test_a_gpu_without_a_number_is_the_callers_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert devices.numbered(torch.device("cuda")) == torch.device("cuda", 3)
    assert devices.numbered(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert devices.numbered(torch.device("cpu")) == torch.device("cpu")
