"""Documents to windows to shards: what is in them, what is held out, what goes on after a kill, what is refused."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from data_tools import pack, pack_tokens, stats, verify
from data_tools.sources.built_in import digits as digit_images
from data_tools.tokens import train_fsq, writing
from data_tools.tokens.texts import kjv, python
from imm_scale.data.dataset import Dataset
from imm_scale.data.manifest import Manifest
from imm_scale.data.tokens.images import open_decoder
from imm_scale.data.tokens.tokenizers import open_tokenizer, tokenizer_of

LENGTH, STRIDE = 7, 3


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """40 documents of 0 to 78 letters, each of its own: a window says where it is from."""
    folder = tmp_path / "texts"
    letters = np.random.default_rng(0).integers(97, 123, (40, 80)).astype(np.uint8)
    for i, row in enumerate(letters):
        path = folder / f"{'ab'[i % 2]}/{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row[: 2 * i].tobytes())
    (folder / ".hidden").write_text("not a text of ours" * 9)
    return folder


def _pack(out: Path | str, *words: str) -> int:
    return pack_tokens.main([*words, "--out", str(out)])


def _words(source: Path | str, *more: str) -> list[str]:
    words = ["--source", str(source), "--length", str(LENGTH), "--stride", str(STRIDE), "--shard-samples", "100"]
    return [*words, "--heldout", "0.25", *more]


def _windows(url: str) -> list[bytes]:
    dataset = Dataset(url)
    rows = [shard.read(0, info.samples) for shard, info in zip(dataset.shards, dataset.manifest.shards, strict=True)]
    return [row.astype(np.uint8).tobytes() for row in np.concatenate(rows)]


def _expected(content: bytes) -> list[bytes]:
    return [content[i : i + LENGTH] for i in range(0, len(content) - LENGTH + 1, STRIDE)]


def _files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_every_window_of_every_document_is_in_one_part_and_a_document_in_no_two(texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert _pack(out, *_words(texts)) == 0
    said = capsys.readouterr().out
    parts = {name: _windows(f"{out}/{name}manifest.json") for name in ("", "heldout/")}
    contents = [path.read_bytes() for path in sorted(texts.rglob("*.txt"))]
    every = Counter(window for content in contents for window in _expected(content))
    assert Counter(parts[""]) + Counter(parts["heldout/"]) == every
    trained, held_out = map(set, parts.values())
    for content in contents:
        theirs = set(_expected(content))
        assert not (theirs & trained and theirs & held_out), "a document is trained on or held out as a whole"
    assert parts[""] != sorted(parts[""]), "shuffled"
    manifest = Manifest.load(f"{out}/manifest.json")
    assert [shard.samples for shard in manifest.shards][:-1] == [100] * (len(manifest.shards) - 1)
    assert (manifest.vocabulary, manifest.latent_shape, manifest.num_classes) == (256, (LENGTH,), 1)
    short = [content for content in contents if len(content) < LENGTH]
    table = {row[0]: list(map(int, row[1:])) for line in said.splitlines() if len(row := line.split()) == 6}
    totals = np.array([table["train"], table["heldout"]]).sum(axis=0).tolist()
    # Tokens behind the last window of a document, and whole documents that are too short.
    behind = sum((len(content) - LENGTH) % STRIDE for content in contents if len(content) >= LENGTH)
    left_out = behind + sum(map(len, short))
    assert totals == [40, sum(map(len, contents)), len(parts[""]) + len(parts["heldout/"]), len(short), left_out]
    assert table["heldout"][0] == 10
    for name in ("", "heldout/"):
        assert verify.main([f"{out}/{name}manifest.json", "--workers", "1"]) == 0


def test_a_job_that_was_stopped_goes_on_to_the_same_bytes(texts, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert _pack(whole, *_words(texts)) == 0
    written, write_shard = [], writing.write_shard

    def dying(*args: object) -> object:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(args[1])
        return write_shard(*args)

    monkeypatch.setattr(writing, "write_shard", dying)
    assert _pack(stopped, *_words(texts)) != 0
    assert not (stopped / "manifest.json").exists()
    first = sorted(stopped.rglob("tokens-*.tar"))[0]
    second = sorted(stopped.rglob("tokens-*.tar"))[1]
    stamp = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:-1000])  # as no kill leaves it, but a disk may
    (stopped / "tokens-000003.tar.0123abcd.tmp").write_bytes(b"torn")
    monkeypatch.setattr(writing, "write_shard", write_shard)
    assert _pack(stopped, *_words(texts)) == 0
    assert first.stat().st_mtime_ns == stamp, "what is whole stays"
    (stopped / "tokens-000003.tar.0123abcd.tmp").unlink()
    assert _files(stopped) == _files(whole)
    capsys.readouterr()
    assert _pack(stopped, *_words(texts)) == 0
    assert "already packed" in capsys.readouterr().out and _files(stopped) == _files(whole)
    # Another source of the same bytes at another place is the same.
    moved = texts.rename(tmp_path / "moved")
    assert _pack(stopped, *_words(moved)) == 0
    (moved / "a/02.txt").write_text("changed")
    assert _pack(stopped, *_words(moved)) == 2
    assert "holds other tokens; they differ in source_sha256" in capsys.readouterr().err


def test_a_single_file_is_cut_once_between_characters(tmp_path):
    path, out = tmp_path / "one.txt", tmp_path / "out"
    text = "aé€" * 100  # 1, 2 and 3 bytes
    path.write_text(text, encoding="utf-8")
    assert _pack(out, "--source", str(path), "--length", "1", "--heldout", "0.25") == 0
    content, trained = text.encode(), Dataset(f"{out}/manifest.json")
    cut = len(trained)
    assert 450 <= cut <= 452 and content[:cut].decode()
    np.testing.assert_array_equal(np.sort(trained.read(0, cut)[:, 0]), np.sort(list(content[:cut])))
    assert len(Dataset(f"{out}/heldout/manifest.json")) == 600 - cut


def test_text27_and_a_tokenizer_of_a_file_come_back_as_text(texts, tmp_path, capsys):
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([path.read_text() for path in texts.rglob("*.txt")], vocab_size=300)
    file = tmp_path / "t.json"
    library.save(str(file))
    for name, dtype in (("text27", "uint8"), (f"hf:{file}", "uint16")):
        out = tmp_path / name[:2]
        assert _pack(out, *_words(texts, "--tokenizer", name)) == 0
        dataset = Dataset(f"{out}/manifest.json")
        tokenizer = tokenizer_of(dataset.manifest.token_codec, str(out))
        joined = " ".join(path.read_text() for path in texts.rglob("*.txt"))
        assert tokenizer.decode(dataset.read(0, 1)[0]) in joined
        assert dataset.manifest.stored_dtype.name == dtype
        assert dataset.manifest.token_codec.bits_in >= 8 * LENGTH
        assert (out / "tokenizer.json").exists() == name.startswith("hf")


def test_digits_are_their_pixels_in_black_and_white(tmp_path, capsys):
    assert _pack(tmp_path / "out", "--source", "digits") == 0
    source = digit_images()
    expected = Counter(
        ((np.stack(source.images) >= 128).reshape(-1, 64).astype(np.uint8)[i].tobytes(), label)
        for i, label in enumerate(source.labels)
    )
    found: Counter[tuple[bytes, int]] = Counter()
    for part in ("", "heldout/"):
        dataset = Dataset(f"{tmp_path}/out/{part}manifest.json")
        rows = dataset.read(0, len(dataset))
        found += Counter((row.tobytes(), label) for row, label in zip(rows, dataset.labels.tolist(), strict=True))
    assert found == expected
    codec = dataset.manifest.token_codec
    assert (codec.image_shape, codec.vocabulary, dataset.manifest.num_classes) == ((8, 8), 2, 10)
    assert "bit compression 8;" in capsys.readouterr().out  # 64 pixels of 8 bits over 64 tokens of one
    assert stats.main([f"{tmp_path}/out/manifest.json"]) == 0


def test_codes_decode_to_images_near_those_that_were_packed(tmp_path, monkeypatch, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    assert pack.main(["--source", "digits", "--out", str(images)]) == 0
    words = ["--source", "codes", "--images", str(images), "--train-steps", "60"]
    assert _pack(out, *words) == 0
    manifest = Manifest.load(f"{out}/manifest.json")
    codec = manifest.token_codec
    assert (codec.vocabulary, manifest.latent_shape, codec.image_shape) == (200, (64,), (8, 8))
    dataset = Dataset(f"{out}/manifest.json")
    decoded = open_decoder(codec, str(out))(torch.from_numpy(dataset.read(0, 100)))
    originals = torch.from_numpy(np.stack(digit_images().images)).float()
    nearest = (decoded[:, None, :, :, 0].float() - originals[None]).square().flatten(2).mean(dim=2).min(dim=1).values
    # The pixels' own variance is 0.55 x 127.5^2; 60 steps of training leave a tenth of it.
    assert nearest.mean() < 0.1 * originals.var()
    # Again with the net that is there; a stopped job does not train anew.
    monkeypatch.setattr(train_fsq, "train", None)
    before = _files(out)
    (out / "manifest.json").unlink()
    assert _pack(out, *words) == 0 and _files(out) == before
    named = ["--autoencoder", f"{out}/autoencoder.safetensors"]
    assert _pack(tmp_path / "named", *words[:-2], *named) == 0
    assert _files(tmp_path / "named")["tokens-000000.tar"] == before["tokens-000000.tar"]
    capsys.readouterr()
    assert _pack(out, *words[:-1], "61") == 2
    assert "was trained on other images or otherwise" in capsys.readouterr().err


def test_the_built_in_texts_are_the_known_ones():
    chapters = list(kjv().documents)
    assert len(chapters) == 1189, "chapters of the King James Version"
    joined = b" ".join(chapter.content for chapter in chapters)
    assert len(open_tokenizer("text27").encode(joined)) == 4_014_553  # of its source without anything but letters
    assert chapters[0].content.startswith(b"1. In the beginning God created the heaven and the earth. 2. And the earth")
    library = python()
    names = [next(library.documents).name for _ in range(3)]
    assert library.count > 500 and names == sorted(names)


REFUSED = [
    (["--length", "0"], "--length is 0: it must be at least 1"),
    (["--stride", "0"], "--stride is 0"),
    (["--shard-samples", "0"], "--shard-samples is 0"),
    (["--heldout", "1"], r"--heldout is 1\.0: a share"),
    (
        ["--length", "500"],
        r"none of the \d+ documents of (heldout|train) has 500 tokens, the longest \d+: lower --length",
    ),
    (["--tokenizer", "words"], "'words' is none of bytes, text27, hf:FILE"),
    (["--tokenizer", "binary"], "--tokenizer binary is for images"),
    (["--images", "x"], "--images is for --source codes"),
    (["--train-steps", "5"], "--train-steps is for --source codes"),
    (["--source", "nowhere"], "--source nowhere: neither a folder nor a file"),
    (["--source", "codes"], "--source codes needs --images"),
    (["--source", "digits"], "--length is for texts: an image of --source digits is one sequence"),
    (["--source", "digits", "--tokenizer", "bytes"], "--source digits has the tokenizer binary"),
    (["--source", "codes", "--images", "x", "--autoencoder", "y", "--train-steps", "5"], "give one of them"),
    (["--source", "codes", "--images", "x", "--autoencoder", "y"], "no autoencoder at y"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_cannot_be_packed_is_refused(texts, tmp_path, capsys, words, message):
    assert _pack(tmp_path / "out", *_words(texts, *words)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out/manifest.json").exists()


def test_bad_places_and_texts_are_refused(texts, tmp_path, capsys):
    assert _pack(texts / "out", *_words(texts)) == 2
    assert "lies inside --source" in capsys.readouterr().err
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert _pack(out, *_words(texts)) == 2
    assert "holds 'notes.txt', which is no part of packed tokens" in capsys.readouterr().err
    (texts / "a/99.txt").write_bytes(b"caf\xe9 " * 30)
    assert _pack(tmp_path / "new", *_words(texts, "--tokenizer", "text27")) == 2
    assert "a/99.txt is no UTF-8 (byte 0xe9 at 3)" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert _pack(tmp_path / "new", *_words(tmp_path / "empty")) == 2
    assert "holds no files" in capsys.readouterr().err
