import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from imm_scale import storage
from imm_scale.data import tar
from imm_scale.data.manifest import Manifest, ShardInfo
from imm_scale.data.shards import INDEX_DTYPE, ShardReader, npy_header, open_shard, write_shard
from imm_scale.errors import UserError

SHAPE = (2, 3, 5)


@pytest.fixture
def latents() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((9, *SHAPE)).astype(np.float16)


@pytest.fixture
def info(tmp_path: Path, latents: np.ndarray) -> ShardInfo:
    return write_shard(str(tmp_path), "s.tar", [f"k/{i}" for i in range(9)], latents, list(range(9)))


def _open(tmp_path: Path, info: ShardInfo, shape: tuple[int, int, int] = SHAPE) -> ShardReader:
    return open_shard(str(tmp_path), info, shape, num_classes=9)


def test_reads_back_any_range(tmp_path: Path, latents: np.ndarray, info: ShardInfo) -> None:
    reader = _open(tmp_path, info)
    assert reader.labels.tolist() == list(range(9))
    for start in range(9):
        for stop in range(start + 1, 10):
            block = reader.read(start, stop)
            assert block.dtype == np.float16 and block.flags.c_contiguous
            np.testing.assert_array_equal(block, latents[start:stop])


@pytest.mark.filterwarnings("ignore")
def test_stock_webdataset_reads_the_same(tmp_path: Path, latents: np.ndarray, info: ShardInfo) -> None:
    samples = list(wds.WebDataset(str(tmp_path / info.name), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"k/{i}" for i in range(9)]
    assert [sample["cls"] for sample in samples] == list(range(9))
    np.testing.assert_array_equal(np.stack([sample["latent.npy"] for sample in samples]), latents)


def test_the_format_is_as_documented(tmp_path: Path, latents: np.ndarray, info: ShardInfo) -> None:
    data = (tmp_path / "s.tar").read_bytes()
    index = np.load(tmp_path / "s.index.npy", allow_pickle=False)
    assert index.dtype == INDEX_DTYPE
    for row, latent in zip(index, latents, strict=True):
        file = data[row["offset"] : row["offset"] + row["length"]]
        np.testing.assert_array_equal(np.load(io.BytesIO(file), allow_pickle=False), latent)
    with tarfile.open(tmp_path / "s.tar") as archive:
        members = archive.getmembers()
    assert {member.mtime for member in members} == {0}
    assert [member.name for member in members[:2]] == ["k/0.latent.npy", "k/0.cls"]
    assert len(npy_header(SHAPE)) % 64 == 0


def test_same_samples_give_the_same_bytes(tmp_path: Path, latents: np.ndarray, info: ShardInfo) -> None:
    again = write_shard(str(tmp_path / "again"), "s.tar", [f"k/{i}" for i in range(9)], latents, list(range(9)))
    assert again == info
    assert (tmp_path / "again/s.tar").read_bytes() == (tmp_path / "s.tar").read_bytes()


@pytest.mark.parametrize("keep", [0, 1, 511, 512, 700, 1536, 9000])
def test_a_shard_cut_before_opening_is_refused(tmp_path: Path, info: ShardInfo, keep: int) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"s\.tar has {keep} bytes, the manifest says {info.bytes}.*cut short"):
        _open(tmp_path, info)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.33, 0.5, 0.87, 0.99])
def test_a_shard_cut_after_opening_is_found_when_read(
    tmp_path: Path, latents: np.ndarray, info: ShardInfo, part: float
) -> None:
    reader = _open(tmp_path, info)
    path = tmp_path / "s.tar"
    keep = int(part * info.bytes)
    path.write_bytes(path.read_bytes()[:keep])
    for i, row in enumerate(reader.index):
        if row["offset"] + row["length"] <= keep:
            np.testing.assert_array_equal(reader.read(i, i + 1), latents[i : i + 1])
        else:
            with pytest.raises(UserError, match=rf"s\.tar ends at byte {keep}|samples {i}"):
                reader.read(i, i + 1)


def test_every_truncation_is_found(tmp_path: Path, latents: np.ndarray, info: ShardInfo) -> None:
    """Length by length, with the size check of opening and without it (a shard cut after it was opened)."""
    reader, path = _open(tmp_path, info), tmp_path / "s.tar"
    whole = path.read_bytes()
    start, stop = reader.span(0, 9)
    out = np.empty((9, 1, *SHAPE), np.float16)
    for keep in range(len(whole)):
        if keep >= stop:
            reader.decode(whole[start:stop], 0, 9, out)
        else:
            with pytest.raises(UserError, match="cut short"):
                reader.decode(whole[:keep][start:stop], 0, 9, out)
        with pytest.raises(UserError, match=r"cut short|damaged|end of an archive"):
            tar.members(whole[:keep], "s.tar")
    np.testing.assert_array_equal(out[:, 0], latents)
    for keep in range(0, len(whole), 509):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"s\.tar.*cut short"):
            _open(tmp_path, info)


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path, latents: np.ndarray, info: ShardInfo) -> None:
    """Every bit of the tar's headers and of two samples' files, every 13th of the other samples."""
    reader = _open(tmp_path, info)
    whole = (tmp_path / "s.tar").read_bytes()
    start, stop = reader.span(0, 9)
    payload = np.zeros(len(whole), bool)
    for row in reader.index:
        payload[row["offset"] : row["offset"] + row["length"]] = True
    dense = int(reader.index["offset"][2])
    out = np.empty((9, 1, *SHAPE), np.float16)
    for bit in range(8 * len(whole)):
        position = bit // 8
        if position > dense and payload[position] and bit % 13:
            continue
        damaged = bytearray(whole[start:stop])
        if start <= position < stop:
            damaged[position - start] ^= 1 << (bit % 8)
        if payload[position]:
            with pytest.raises(UserError, match=r"s\.tar: sample \d at byte \d+ has crc32"):
                reader.decode(bytes(damaged), 0, 9, out)
        elif bit % 7 == 0:  # outside the files nothing is read
            out[:] = 0
            reader.decode(bytes(damaged), 0, 9, out)
            np.testing.assert_array_equal(out[:, 0], latents)


def test_every_flipped_bit_of_a_header_is_seen_by_the_parser(info: ShardInfo, tmp_path: Path) -> None:
    whole = (tmp_path / "s.tar").read_bytes()
    members = tar.members(whole, "s.tar")
    for header in (members[0].offset - 512, members[5].offset - 512):
        for bit in range(8 * 512):
            damaged = bytearray(whole)
            damaged[header + bit // 8] ^= 1 << (bit % 8)
            try:
                parsed = tar.members(bytes(damaged), "s.tar")
            except UserError:
                continue
            assert parsed == members, bit  # as where a space of the checksum field becomes another filler


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_two_joined_archives_are_not_taken_for_the_first(form: int) -> None:
    def archive(name: str) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as writer:
            writer.addfile(tarfile.TarInfo(name))
        return stream.getvalue()

    name = "a" * (50 if form == tarfile.USTAR_FORMAT else 120)  # the longer one takes an extended header
    assert [member.name for member in tar.members(archive(name), "s.tar")] == [name]
    with pytest.raises(UserError, match=r"s\.tar goes on after the end of an archive at byte"):
        tar.members(archive(name) + archive("b.png"), "s.tar")


def test_names_of_any_bytes() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as writer:
        writer.addfile(tarfile.TarInfo(os.fsdecode(b"caf\xe9.cls")))
    assert [os.fsencode(member.name) for member in tar.members(stream.getvalue(), "s.tar")] == [b"caf\xe9.cls"]


def test_mirrored_latents_stand_beside_the_others(tmp_path: Path, latents: np.ndarray) -> None:
    info = write_shard(str(tmp_path), "f.tar", [str(i) for i in range(9)], latents, [0] * 9, latents[..., ::-1])
    reader = open_shard(str(tmp_path), info, SHAPE, 1, flipped=True)
    assert reader.variants == 2
    out = np.empty((4, 2, *SHAPE), np.float16)
    reader.decode(storage.read_range(reader.url, *reader.span(3, 7)), 3, 7, out)
    np.testing.assert_array_equal(out[:, 0], latents[3:7])
    np.testing.assert_array_equal(out[:, 1], latents[3:7, ..., ::-1])
    np.testing.assert_array_equal(reader.read(0, 9), latents)
    stock = list(wds.WebDataset(str(tmp_path / "f.tar"), shardshuffle=False).decode())
    np.testing.assert_array_equal(np.stack([s["latent_flip.npy"] for s in stock]), latents[..., ::-1])
    with pytest.raises(UserError, match="does not hold 9 rows"):
        open_shard(str(tmp_path), info, SHAPE, 1)


def test_opening_refuses_what_does_not_fit(tmp_path: Path, latents: np.ndarray, info: ShardInfo) -> None:
    with pytest.raises(UserError, match="not of one length"):
        _open(tmp_path, info, shape=(2, 3, 6))
    with pytest.raises(UserError, match=r"labels from 0 to 8, the manifest 5 classes"):
        open_shard(str(tmp_path), info, SHAPE, num_classes=5)
    index = tmp_path / "s.index.npy"
    changed = bytearray(index.read_bytes())
    changed[-1] ^= 1
    index.write_bytes(changed)
    with pytest.raises(UserError, match=r"s\.index\.npy has another sha256"):
        _open(tmp_path, info)
    index.unlink()
    with pytest.raises(UserError, match=r"s\.index\.npy.*missing"):
        _open(tmp_path, info)


def test_an_array_of_another_shape_but_equal_size_is_refused(tmp_path: Path, info: ShardInfo) -> None:
    with pytest.raises(UserError, match="sample 3 is no fp16 array of shape"):
        _open(tmp_path, info, shape=(3, 2, 5)).read(3, 5)


def test_writing_refuses_what_would_not_come_back(tmp_path: Path, latents: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"key 'a\.b' has a dot"):
        write_shard(str(tmp_path), "x.tar", ["a.b"], latents[:1], [0])
    with pytest.raises(UserError, match="does not fit a tar header"):
        write_shard(str(tmp_path), "x.tar", ["a" * 300], latents[:1], [0])
    latents[1, 0, 0, 0] = np.inf
    with pytest.raises(UserError, match="sample two has values that fp16 cannot hold"):
        write_shard(str(tmp_path), "x.tar", ["one", "two"], latents[:2], [0, 0])
    assert not (tmp_path / "x.tar").exists()


def test_manifest_and_shards_agree(make_dataset) -> None:  # type: ignore[no-untyped-def]
    url = make_dataset([3, 5], kind="vae")
    manifest = Manifest.load(url)
    for shard in manifest.shards:
        reader = open_shard(str(Path(url).parent), shard, manifest.stored_shape, manifest.num_classes)
        assert reader.read(0, shard.samples).shape == (shard.samples, 4, 3, 3)
