"""Archives that are cut, damaged, joined, or something else than their names say."""

import gzip
import io
import stat
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools import pack, sources
from data_tools.images import Rendered, render
from data_tools.sources import base
from imm_scale.errors import UserError
from tests.unit.data_tools.sources import trees
from tests.unit.test_errors import file_size_limit

FILES = {f"c{i % 2}/{'x' * 120 * (i == 3)}{i}.png".encode(): trees.png(i) for i in range(4)}
LABELLED = {b"0.png": trees.png(0), b"0.cls": b"3", b"1.png": trees.png(1), b"1.cls": b"0"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("archives")
    trees.as_zip(folder / "a.zip", FILES)
    trees.as_tar(folder / "gnu.tar", FILES)
    trees.as_tar(folder / "pax.tar", FILES, form=tarfile.PAX_FORMAT)
    trees.as_tar(folder / "labelled.tar", LABELLED)
    trees.as_tar(folder / "a.tar.xz", FILES, mode="w:xz")
    (folder / "a.tgz").write_bytes(gzip.compress((folder / "gnu.tar").read_bytes()))
    rows = {"image": list(FILES.values()), "label": [0, 1, 0, 1]}
    pyarrow.parquet.write_table(pa.table(rows), folder / "a.parquet")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _find(path: Path) -> sources.Source:
    base.open_zip.cache_clear()  # it keeps the archive that stood there before
    return sources.find(sources.locate([str(path)]), None, "image", "label")


def _needed(name: str, data: bytes) -> int:
    """Bytes without which an archive is not whole: a tar's writer may add any number of empty blocks."""
    return len(data.rstrip(b"\0")) + 1024 if name.endswith(".tar") else len(data)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cut_archive_is_never_a_shorter_one(archives, tmp_path, data):
    name = data.draw(st.sampled_from(sorted(archives)))
    size = data.draw(st.integers(0, _needed(name, archives[name]) - 1))
    (tmp_path / name).write_bytes(archives[name][:size])
    with pytest.raises(UserError, match=name):
        _find(tmp_path / name)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_a_message_or_a_bad_image(archives, tmp_path, data):
    name = data.draw(st.sampled_from(sorted(archives)))
    damaged = bytearray(archives[name])
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255)), min_size=1)
    ):
        damaged[place] = value
    (tmp_path / name).write_bytes(damaged)
    try:
        source = _find(tmp_path / name)
    except UserError as error:
        assert name in str(error)
    else:
        for image in source.images:
            render(image, 3, 8)


def _zip_with(**header: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name.decode(), content)
    data = bytearray(stream.getvalue())
    for signature, flags_at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(signature)
        data[at + flags_at] |= header.get("flags", 0)
        data[at + flags_at + 2] = header.get("method", 0)
    return bytes(data)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"method": 93}, "compressed by method 93"),
        ({"method": 98}, "compressed by method 98"),
        ({"flags": 1}, "password"),
    ],
)
def test_one_member_that_cannot_be_read_is_left_out(tmp_path, capsys, header, reason):
    """Methods 93 and 98 are Zstandard and PPMd."""
    (tmp_path / "a.zip").write_bytes(_zip_with(**header))
    out = tmp_path / "out"
    assert pack.main(["--source", str(tmp_path / "a.zip"), "--out", str(out)]) == 0
    assert "packed 3 images" in capsys.readouterr().out
    assert reason in (out / "quarantine.txt").read_text()


def test_an_archive_under_a_password_is_refused(tmp_path):
    data = bytearray(_zip_with())
    for signature, flags_at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = -1
        while (at := data.find(signature, at + 1)) >= 0:
            data[at + flags_at] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.zip is protected by a password"):
        _find(tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"", r"a\.zip is empty"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        ("a.tgz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        ("a.tar.gz", b"<!DOCTYPE html><title>Log in</title>", "is a web page"),
        ("a.zip", b"Rar!\x1a\x07\x00", "is no readable ZIP file: it begins with"),
        ("a.tar", b"PK\x03\x04" + bytes(600), "is no readable tar archive"),
        ("a.7z", b"7z\xbc\xaf'\x1c", "unpack it first"),
        ("a.tar.zst", b"(\xb5/\xfd", "unpack it first"),
        ("a.png", trees.png(), "is an image: a folder of images per class"),
    ],
)
def test_what_a_file_is_instead(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        _find(tmp_path / name)


def test_joined_tars_can_be_cut_apart_as_the_message_says(archives, tmp_path):
    joined = archives["gnu.tar"] + bytes(512) + archives["pax.tar"]
    (tmp_path / "joined.tar").write_bytes(joined)
    with pytest.raises(UserError, match="two tars do that were joined") as error:
        _find(tmp_path / "joined.tar")
    size = int(str(error.value).split("head -c ")[1].split(",")[0])
    (tmp_path / "one.tar").write_bytes(joined[:size])
    (tmp_path / "two.tar").write_bytes(joined[size:])
    assert len(_find(tmp_path / "one.tar").images) == len(_find(tmp_path / "two.tar").images) == 4


def _members() -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for field, value in fields.items():
            setattr(info, field, value)
        return info, content

    yield member("a/first.png", FILES[b"c0/0.png"])
    yield member("a/hard.png", type=tarfile.LNKTYPE, linkname="a/first.png")
    yield member("b/soft.png", type=tarfile.SYMTYPE, linkname="../a/hard.png")
    yield member("b/gone.png", type=tarfile.SYMTYPE, linkname="nowhere.png")
    yield member("b/again.png", b"older")
    yield member("b/again.png", FILES[b"c1/1.png"])
    yield member("b/pipe.png", type=tarfile.FIFOTYPE)


@pytest.mark.parametrize("backwards", [False, True])
def test_links_to_links_whatever_their_order(tmp_path, backwards):
    """As tar files of snapshots have them; and a loop, and links to folders that are there and that are not."""
    targets = {f"a/{i}.png": f"{i + 1}.png" for i in range(30)} | {"a/30.png": "../b/0.png", "a/x.png": "y.png"}
    targets |= {"a/y.png": "x.png", "c": "b", "b/d": "e"}
    links = sorted(targets.items(), reverse=backwards)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
        info = tarfile.TarInfo("b/0.png")
        info.size = len(FILES[b"c0/0.png"])
        archive.addfile(info, io.BytesIO(FILES[b"c0/0.png"]))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, target in links:
            entry = zipfile.ZipInfo(name)
            entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, target)
        archive.writestr("b/0.png", FILES[b"c0/0.png"])
    for name in ("a.tar", "a.zip"):
        source = _find(tmp_path / name)
        assert source.class_names == ["a", "b"] and source.labels == [0] * 31 + [1]
        assert {sources.read(image) for image in source.images} == {FILES[b"c0/0.png"]}
        assert {reason: count for reason, (count, _) in source.left_out.reasons.items()} == {
            "links that lead nowhere": 3,
            "links to folders that are packed already": 1,
        }


def test_a_class_that_is_a_link_out_of_the_archive_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in FILES.items():
            info = tarfile.TarInfo(name.decode())
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("b")
        info.type, info.linkname = tarfile.SYMTYPE, "/data/b"
        archive.addfile(info)
    with pytest.raises(UserError, match=r"a\.tar:b, beside .* leads nowhere \(to /data/b\)"):
        _find(tmp_path / "a.tar")


def test_archives_in_archives_are_named(tmp_path):
    inner = trees.as_zip(tmp_path / "in.zip", FILES).read_bytes()
    for outer in (
        trees.as_zip(tmp_path / "a.zip", {b"x.zip": inner}),
        trees.as_tar(tmp_path / "a.tar", {b"x.zip": inner}),
    ):
        with pytest.raises(UserError, match=r"1 files that are no images \(\.zip\), as .*x\.zip.*only tars in tars"):
            _find(outer)


def test_links_and_newer_files_of_one_name_are_as_unpacked(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for info, content in _members():
            archive.addfile(info, io.BytesIO(content))
    with tarfile.open(tmp_path / "a.tar") as archive:
        archive.extractall(tmp_path / "unpacked", filter="tar")
    damaged = _find(tmp_path / "a.tar")
    unpacked = _find(tmp_path / "unpacked")
    readable = [i for i, name in enumerate(unpacked.names) if not name.endswith("gone.png")]
    assert [sources.read(image) for image in damaged.images] == [sources.read(unpacked.images[i]) for i in readable]
    assert damaged.labels == [unpacked.labels[i] for i in readable]
    assert set(damaged.left_out.reasons) == {
        "links that lead nowhere",
        "older files of the same name",
        "pipes, sockets and devices",
    }


@pytest.mark.parametrize(
    ("samples", "labels", "bad"),
    [
        ({b"a.jpg": b"x", b"b.jpg": b"x", b"a.cls": b"\xef\xbb\xbf1\r\n", b"b.cls": b" 0\n"}, {"a": 1, "b": 0}, []),
        ({b"a.jpg": b"x", b"a.cls": b"\xff\x00", b"b.jpg": b"x", b"b.cls": b"1"}, {"b": 1}, ["bytes that are no text"]),
        ({b"a.jpg": b"x", b"a.cls": b"", b"b.jpg": b"x", b"b.cls": b"1"}, {"b": 1}, ["holds no label but ''"]),
        ({b"a.jpg": b"x", b"b.cls": b"1", b"b.jpg": b"x", b"c.cls": b"1"}, {"b": 1}, ["no .cls", "no image"]),
        ({b"a.jpg": b"x", b"a.json": b'{"label": 2}', b"b.jpg": b"x", b"b.json": b"{}"}, {"a": 2}, ["no key 'label'"]),
        ({b"x/a.jpg": b"x", b"x/a.cls": b"4", b"x/a.txt": b"a cat"}, {"x/a": 4}, []),
        ({b"a.seg.png": b"s", b"a.png": b"x", b"a.cls": b"0"}, {"a": 0}, []),
        (
            {b"a.jpg": b"x", b"a.cls": b"version https://git-lfs.github.com", b"b.jpg": b"x", b"b.cls": b"1"},
            {"b": 1},
            ["a Git LFS pointer"],
        ),
        ({b"a.jpg": b"x", b"a.cls": b"10.0", b"b.jpg": b"x", b"b.cls": b"2.\n\0"}, {"a": 10, "b": 2}, []),
        (
            {b"a.jpg": b"x", b"a.json": b'{"label": 3.0}', b"b.jpg": b"x", b"b.json": b'{"label": 0.5}'},
            {"a": 3},
            ["0.5"],
        ),
        ({b"a.jpg": b"x", b"a.json": b"[" * 100_000, b"b.jpg": b"x", b"b.json": b'{"label": 0}'}, {"b": 0}, ["depth"]),
        (
            {b"a.jpg": b"x", b"a.json": b'{"label": ' + b"9" * 5000 + b"}", b"b.jpg": b"x", b"b.json": b'{"label": 0}'},
            {"b": 0},
            ["4300"],
        ),
    ],
)
def test_samples_with_labels_beside_them(tmp_path, samples, labels, bad):
    trees.as_tar(tmp_path / "a.tar", samples)
    source = _find(tmp_path / "a.tar")
    assert {name.split(":")[1]: label for name, label in zip(source.names, source.labels, strict=True)} == labels
    assert all(sources.read(image) == b"x" for image in source.images)
    assert len(source.bad) == len(bad)
    assert all(phrase in reason for phrase, (_, reason) in zip(bad, source.bad, strict=True))


def test_images_beside_the_one_of_a_sample_are_counted(tmp_path):
    """Masks and the like: of two with equally short extensions, the first in the tar is taken."""
    samples = {b"a.png": b"x", b"a.jpg": b"m", b"a.seg.png": b"s", b"a.cls": b"0", b"b.jpg": b"x", b"b.cls": b"1"}
    source = _find(trees.as_tar(tmp_path / "a.tar", samples))
    assert [sources.read(image) for image in source.images] == [b"x", b"x"]
    assert source.left_out.reasons == {
        "further images of samples that have several": (2, f"{tmp_path}/a.tar:a"),
    }


def test_classes_named_by_more_digits_than_python_reads(tmp_path):
    files = {b"7" * 5000 + b"/1.png": trees.png(0), b"12/1.png": trees.png(1), b"9/1.png": trees.png(2)}
    for path in (trees.as_zip(tmp_path / "a.zip", files), trees.as_tar(tmp_path / "a.tar", files)):
        assert pack.main(["--source", str(path), "--out", str(tmp_path / f"{path.suffix}-out")]) == 0
        assert _find(path).class_names == ["12", "7" * 5000, "9"], "in the order of names, as one is no number"


def test_labels_of_two_kinds_are_refused_by_the_odd_one(tmp_path):
    samples = {b"a.jpg": b"x", b"a.cls": b"1", b"b.jpg": b"x", b"b.cls": b"1O", b"c.jpg": b"x", b"c.cls": b"2"}
    trees.as_tar(tmp_path / "a.tar", samples)
    with pytest.raises(UserError, match=r"'1O' of .*a\.tar:b"):
        _find(tmp_path / "a.tar")


def test_a_name_that_looks_like_something_else(tmp_path):
    """A tar begins with the name of its first file."""
    for start in (b"\x1f\x8b\x08", b"<html>", b"BZh9"):
        trees.as_tar(tmp_path / "a.tar", {start + b"/1.png": FILES[b"c0/0.png"], b"b/1.png": FILES[b"c1/1.png"]})
        assert isinstance(render(_find(tmp_path / "a.tar").images[0], 3, None), Rendered)


@pytest.mark.parametrize("form", ["size", "pax"])
def test_claims_of_more_than_there_is(tmp_path, form):
    """An exabyte in a header: neither sought nor allocated."""
    whole = bytearray(trees.as_tar(tmp_path / "a.tar", {b"a/1.png": FILES[b"c0/0.png"]}).read_bytes())
    whole[124:136] = b"\x80" + (1 << 60).to_bytes(11, "big")
    if form == "pax":
        whole[156:157] = tarfile.XHDTYPE
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    (tmp_path / "a.tar").write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.tar"):
        _find(tmp_path / "a.tar")


def _unicode_path(stored: bytes, name: str, crc: int | None = None) -> bytes:
    """APPNOTE.TXT 4.6.9, written by hand."""
    content = bytes([1]) + (zlib.crc32(stored) if crc is None else crc).to_bytes(4, "little") + name.encode()
    return (0x5455).to_bytes(2, "little") + bytes([1, 0, 0]) + b"up" + len(content).to_bytes(2, "little") + content


def test_names_beside_those_of_a_code_page(tmp_path):
    """As WinRAR writes them where the code page lacks the letters: all look alike."""
    entries = [("??/1.png", "\u72ac/1.png"), ("??/1.png", "\u732b/1.png"), ("??/2.png", "\u732b/2.png")]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two entries with one name
        for i, (stored, name) in enumerate(entries):
            info = zipfile.ZipInfo(stored)
            info.create_system, info.extra = 0, _unicode_path(stored.encode(), name)
            archive.writestr(info, list(FILES.values())[i])
        info = zipfile.ZipInfo("b/1.png")  # renamed since by a program that does not know the field
        info.extra = _unicode_path(b"b/1.png", "gone/1.png", crc=1)
        archive.writestr(info, list(FILES.values())[3])
    source = _find(tmp_path / "a.zip")
    assert source.class_names == ["b", "\u72ac", "\u732b"] and source.labels == [0, 1, 2, 2]
    assert [sources.read(image) for image in source.images] == [list(FILES.values())[i] for i in (3, 0, 1, 2)]
    assert not source.left_out.reasons


def test_a_zip_behind_something_else(tmp_path):
    """A program that unpacks it, or the marker of an archive that was to be of several parts."""
    whole = trees.as_zip(tmp_path / "a.zip", FILES).read_bytes()
    for before in (b"MZ" + bytes(2000), b"PK\x07\x08"):
        (tmp_path / "a.zip").write_bytes(before + whole)
        source = _find(tmp_path / "a.zip")
        assert [sources.read(image) for image in source.images] == [FILES[name] for name in sorted(FILES)]


def test_names_of_windows_in_a_zip(tmp_path):
    """Backslashes, and letters in the code page of DOS, in which 0x84 is an umlaut and no UTF-8."""
    files = {b"set\\k\x84fer\\1.png": FILES[b"c0/0.png"], b"set\\ant\\1.png": FILES[b"c1/1.png"]}
    data = bytearray(trees.as_zip(tmp_path / "a.zip", files).read_bytes())
    at = -1
    while (at := data.find(b"PK\1\2", at + 1)) >= 0:
        data[at + 5] = 0  # written on DOS
    (tmp_path / "a.zip").write_bytes(data)
    assert _find(tmp_path / "a.zip").class_names == ["ant", "käfer"]


def test_labels_and_a_map_that_calls_classes_by_other_numbers(tmp_path):
    """Does the label 1 mean class 1, or the class named "1"?"""
    trees.as_tar(tmp_path / "a.tar", LABELLED)
    located = sources.locate([str(tmp_path / "a.tar")])
    with pytest.raises(UserError, match="numbers that are not their own"):
        sources.find(located, ["1", "2", "3", "4"], "image", "label")
    assert sources.find(located, ["0", "1", "2", "3"], "image", "label").labels == [3, 0]
    assert sources.find(located, ["d", "c", "b", "a"], "image", "label").labels == [3, 0]


@pytest.mark.parametrize("name", ["a.parquet", "a.tgz"])
def test_a_full_disk_of_temporary_files_says_how_to_choose_another(archives, tmp_path, name):
    (tmp_path / name).write_bytes(archives[name])
    with file_size_limit(400), pytest.raises(UserError, match=r"no file may grow that large.*TMPDIR=/some/folder"):
        _find(tmp_path / name)


def test_links_in_a_zip_lead_to_files_of_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/1.png", FILES[b"c0/0.png"])
        for name, target in (("b/2.png", "../a/1.png"), ("b/3.png", "nowhere.png")):
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    source = _find(tmp_path / "a.zip")
    assert source.class_names == ["a", "b"] and source.labels == [0, 1]
    assert [sources.read(image) for image in source.images] == [FILES[b"c0/0.png"]] * 2
    assert source.left_out.reasons["links that lead nowhere"][0] == 1


def test_no_place_for_temporary_files(archives, tmp_path, monkeypatch):
    (tmp_path / "a.tgz").write_bytes(archives["a.tgz"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"a\.tgz needs a temporary file .*TMPDIR"):
        _find(tmp_path / "a.tgz")
