"""Sequences of tokens in shards: their manifest, their types, their order, and what is refused."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from torch import Tensor

from data_tools import stats, verify
from imm_scale import config as configs
from imm_scale.data import sample_order
from imm_scale.data.dataset import Dataset
from imm_scale.data.loader import Loader, Reading
from imm_scale.data.manifest import Manifest, TokenCodec, check_expectations, parse, unseen
from imm_scale.data.sample_order import Layout
from imm_scale.data.shards import write_shard
from imm_scale.data.spaces import Latents, LatentsConfig, SampleSpace
from imm_scale.errors import UserError
from imm_scale.planner.estimate import describe_data
from tests.unit.data.order import batch_indices

CLASSES, LENGTH, BATCH, SEED, BLOCK = 3, 5, 12, 5, 4
WIDTHS = [(256, "uint8"), (200, "uint8"), (257, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "int32")]


def _tokens(samples: int, vocabulary: int) -> np.ndarray:
    """(samples, LENGTH); the first of sample i is i, the last one the largest there is."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (samples, LENGTH))
    tokens[:, 0], tokens[:, -1] = np.arange(samples), vocabulary - 1
    return tokens


def _write(folder: Path, shard_samples: list[int], vocabulary: int, codec: TokenCodec | None = None) -> str:
    codec = codec or TokenCodec(vocabulary, "bytes", "ab" * 32, bits_in=8.0 * LENGTH)
    tokens = _tokens(sum(shard_samples), vocabulary).astype(TokenCodec(vocabulary, "", "").stored_dtype)
    shards, first = [], 0
    for number, samples in enumerate(shard_samples):
        index = range(first, first + samples)
        labels = [i % CLASSES for i in index]
        keys = [f"{i:06d}" for i in index]
        shards.append(write_shard(str(folder), f"t-{number}.tar", keys, tokens[first : first + samples], labels))
        first += samples
    url = str(folder / "manifest.json")
    Manifest(codec, (LENGTH,), CLASSES, (), tuple(shards)).save(url)
    return url


@dataclass(frozen=True)
class Raw(SampleSpace):
    """Tokens as they are."""

    dtype = torch.int64
    shape: tuple[int, ...] = (LENGTH,)
    num_classes: int = CLASSES
    class_names: tuple[str, ...] = ()
    image_size = None
    provenance = {"kind": "tokens", "weights": ""}  # noqa: RUF012

    @classmethod
    def of(cls, config: Any, manifest: Manifest) -> "Raw":
        return cls()

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "Raw":
        return cls()

    def prior(self, seed: int, purpose: str, index_N: Tensor, stream: int = 0) -> Tensor:
        raise NotImplementedError

    def from_stored(
        self, stored_N: Tensor, seed: int, purpose: str, ordinal_N: Tensor, out: Tensor | None = None
    ) -> Tensor:
        tokens = stored_N.to(torch.int64)
        return tokens if out is None else out.copy_(tokens)

    def artifacts(self, decoder: str | None, device: torch.device, precision: str = "fp32") -> Any:
        raise NotImplementedError


def _rows(url: str, steps: int, world: int = 1, start: int = 0, **options: Any) -> dict[int, tuple[list[int], int]]:
    """{ordinal: (tokens, label)} of all ranks."""
    rows = {}
    for rank in range(world):
        with Loader(
            url, Layout(BATCH, 1, world, BATCH), rank, SEED, BLOCK, start * BATCH, space=Raw(), **options
        ) as data:
            for batch in islice(data, steps):
                real = int(batch.weight.sum())
                items = zip(batch.ordinal, batch.x, batch.condition, strict=True)
                rows |= {int(o): (x.tolist(), int(c)) for o, x, c in islice(items, real)}
    return rows


@pytest.mark.parametrize(("vocabulary", "dtype"), WIDTHS)
def test_each_vocabulary_is_stored_as_narrow_as_it_can_be_and_comes_back(tmp_path, vocabulary, dtype):
    url = _write(tmp_path, [30, 7], vocabulary)
    dataset = Dataset(url)
    assert dataset.manifest.stored_dtype.name == dtype and dataset.manifest.format_version == 2
    expected = _tokens(37, vocabulary)
    stored = np.concatenate([dataset.read(0, 30), dataset.read(30, 37)])
    assert stored.dtype.name == dtype
    np.testing.assert_array_equal(stored, expected)
    for ordinal, (x, label) in _rows(url, 3).items():
        assert x == expected[x[0]].tolist() and label == x[0] % CLASSES, ordinal


@pytest.mark.filterwarnings("ignore")
def test_stock_webdataset_reads_the_same(tmp_path):
    _write(tmp_path, [9], 300)
    samples = list(wds.WebDataset(str(tmp_path / "t-0.tar"), shardshuffle=False).decode())
    np.testing.assert_array_equal(np.stack([sample["tokens.npy"] for sample in samples]), _tokens(9, 300))
    assert [sample["cls"] for sample in samples] == [i % CLASSES for i in range(9)]


def test_any_ranks_a_restart_and_a_cache_give_the_order_of_the_plan(tmp_path):
    url = _write(tmp_path / "data", [30, 7, 31], 256)
    whole = _rows(url, 7)
    steps = 68 // BATCH
    for step in range(7):
        order = sample_order.epoch_order([30, 7, 31], BLOCK, SEED, step // steps)
        expected = batch_indices(order, BATCH, step % steps, np.arange(BATCH)).tolist()
        assert [whole[step * BATCH + p][0][0] for p in range(BATCH)] == expected
    assert _rows(url, 3, world=3) | _rows(url, 4, world=2, start=3) == whole
    reading = Reading(cache_dir=str(tmp_path / "cache"))
    assert _rows(url, 7, reading=reading) == _rows(url, 7, reading=reading) == whole


def test_a_gpu_gets_them_as_stored(tmp_path):
    """The meta device stands for a GPU."""
    url = _write(tmp_path, [30], 300)
    with Loader(url, Layout(BATCH, 1, 1, BATCH), 0, SEED, BLOCK, space=Raw(), device="meta") as loader:
        stored = next(loader._prefetcher)
        assert stored.latents.dtype == torch.uint16 and stored.latents.shape == (BATCH, LENGTH)
        assert next(loader).x.dtype == torch.int64


def test_a_token_outside_the_vocabulary_is_named_with_sample_and_shard(tmp_path, capsys):
    url = _write(tmp_path, [10, 10], 200, TokenCodec(199, "bytes", "ab" * 32))
    with pytest.raises(UserError, match=r"t-1\.tar: sample 4 holds the token 199, the vocabulary has 0 to 198"):
        Dataset(url).read(14, 16)
    with pytest.raises(UserError, match=r"holds the token 199"):
        _rows(url, 1)
    assert verify.main([url, "--workers", "1"]) == 1
    assert "pack the same source again" in capsys.readouterr().err
    assert verify.main([url, "--workers", "1", "--repair", "--images", "x", "--codec", "pixels"]) == 2
    assert "--repair encodes images" in capsys.readouterr().err


def test_a_damaged_bit_is_found_and_named(tmp_path):
    url = _write(tmp_path, [40], 256)
    path = tmp_path / "t-0.tar"
    index = np.load(tmp_path / "t-0.index.npy")
    data = bytearray(path.read_bytes())
    data[index["offset"][6] + 129] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"t-0\.tar: block 1 \(samples 4 to 7\) cannot be read.*crc32"):
        _rows(url, 3)
    assert len(_rows(url, 3, reading=Reading(on_bad_block="skip"))) == 3 * BATCH


def test_tools_for_latents_and_flips_are_refused(tmp_path):
    url = _write(tmp_path, [30], 256)
    manifest = Manifest.load(url)
    with pytest.raises(UserError, match=r"data\.flip=true: sequences of tokens have no mirror image"):
        _rows(url, 1, flip=True)
    with pytest.raises(UserError, match=r"holds tokens, where latents or pixels are needed.*data\.space\.name"):
        Latents.of(LatentsConfig(), manifest)
    with pytest.raises(UserError, match=r"holds pixels, where tokens are needed.*pack-tokens"):
        _ = unseen((1, 8, 8), 10).token_codec


def test_verify_and_stats_know_tokens(tmp_path, capsys):
    url = _write(tmp_path, [20, 10], 256)
    assert verify.main([url, "--workers", "1"]) == 0
    assert "2 of 2 shards are right, 30 samples in 3 classes of 10 to 10" in capsys.readouterr().out
    assert stats.main([url]) == 0
    said = capsys.readouterr().out
    # 8 bits a byte, of which 256 tokens need 8.
    assert "bit compression: 1 (40 bits of a sample over 5 x 8.0000 bits of tokens)" in said
    assert "sequences of 5 tokens, bytes abababababab, stored as uint8" in said


IMAGES = TokenCodec(2, "binary", "cd" * 32, (8, 8), 512.0)
MANIFEST = Manifest(IMAGES, (64,), CLASSES, (), Manifest(IMAGES, (64,), 1, (), ()).shards)


def _documents() -> Iterator[tuple[dict[str, Any], str]]:
    codec = {"kind": "tokens", "vocabulary": 2, "tokenizer": "binary", "tokenizer_hash": "", "bits_in": 1.0}
    yield {"codec": {**codec, "vocabulary": 1}}, "vocabulary 1 is not from 2"
    yield {"codec": {**codec, "vocabulary": 2.0}}, "vocabulary is 2.0: int is needed"
    yield {"codec": {**codec, "image_shape": [8]}}, r"image_shape is \[8\]: a list of height and width"
    yield {"codec": {**codec, "image_shape": [8, 0]}}, r"image_shape \[8, 0\] is no height and width"
    yield {"codec": {**codec, "image_shape": [8, "8"]}}, "image_shape holds '8'"
    yield {"codec": {**codec, "bits_in": float("inf")}}, "bits_in inf must be finite"
    yield {"codec": {**codec, "mean": [0.0]}}, "unknown field 'mean'"
    yield {"codec": {key: codec[key] for key in codec if key != "vocabulary"}}, "has no field 'vocabulary'"
    yield {"codec": codec, "latent_shape": [1, 8, 8]}, r"latent_shape \[1, 8, 8\] is no length"
    yield {"codec": codec, "flipped": True}, "tokens have no mirrored ones"


@pytest.mark.parametrize(("changes", "message"), list(_documents()))
def test_bad_manifests_are_refused(tmp_path, changes, message):
    document = json.loads(Path(_write(tmp_path, [4], 2, replace(IMAGES, image_shape=None))).read_text())
    with pytest.raises(UserError, match=message):
        parse(json.dumps({**document, **changes}), "m.json")


def test_a_manifest_comes_back_and_says_what_it_expects(tmp_path):
    url = _write(tmp_path, [4], 2, IMAGES)
    manifest = Manifest.load(url)
    assert manifest.codec == IMAGES and TokenCodec.from_fields(IMAGES.to_fields()) == IMAGES
    assert manifest.stored_shape == manifest.latent_shape == (LENGTH,) and manifest.vocabulary == 2
    check_expectations(manifest, codec="tokens", latent_shape=(LENGTH,), num_classes=CLASSES, vocabulary=2)
    with pytest.raises(UserError, match=r"vocabulary of 2 tokens, data\.vocabulary expects 27"):
        check_expectations(manifest, vocabulary=27)
    with pytest.raises(UserError, match=r"vocabulary of no tokens, data\.vocabulary expects 27"):
        check_expectations(unseen((1, 8, 8), 10), vocabulary=27)
    assert replace(IMAGES, tokenizer_hash="ef").unlike(IMAGES) == {"tokenizer_hash": ("cd" * 32, "ef")}


def test_tokens_can_be_planned_without_data():
    def data(*words: str) -> Any:
        return describe_data(configs.load([], ["data.num_classes=1", *words]).config)

    planned = data("data.latent_shape=[64]", "data.vocabulary=300")
    assert (planned.shape, planned.vocabulary) == ((64,), 300)
    # Header, 128 bytes of npy header and 64 of uint16 in one block of a tar, then header and block of the label.
    assert planned.record_bytes == 4 * 512
    assert unseen(planned.shape, 1, planned.vocabulary).vocabulary == 300
    for words in (["data.latent_shape=[64]"], ["data.latent_shape=[1,8,8]", "data.vocabulary=300"]):
        with pytest.raises(UserError, match=r"tokens have one length, as in data\.latent_shape=\[64\]"):
            data(*words)
    with pytest.raises(
        UserError, match=r"data\.latent_shape=\[8, 8\] must be channels, height and width, or one number"
    ):
        data("data.latent_shape=[8,8]", "data.vocabulary=300")
