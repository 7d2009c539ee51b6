import os
import uuid
from pathlib import Path

import pytest

from imm_scale import storage
from imm_scale.errors import UserError


@pytest.fixture(params=["path", "file://", "memory://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory://":
        return f"memory://{uuid.uuid4().hex}"
    return str(tmp_path) if request.param == "path" else f"file://{tmp_path}"


def test_round_trip(folder: str) -> None:
    url = storage.join(folder, "a", "b.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, b"0123456789")
    assert storage.exists(url) and storage.size(url) == 10
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.read_range(url, 3, 6) == b"345"
    assert storage.read_range(url, 8, 20) == b"89", "shorter at the end of the file"
    storage.write_text(url, "größer")
    assert storage.read_text(url) == "größer"


def test_listing_and_removing(folder: str) -> None:
    for name in ("b", "a", "c/d"):
        storage.write_bytes(storage.join(folder, name), b"x")
    assert storage.list_names(folder) == ["a", "b", "c"]
    storage.remove(storage.join(folder, "c"))
    storage.remove(storage.join(folder, "a"))
    storage.remove(storage.join(folder, "never there"))
    assert storage.list_names(folder) == ["b"]
    assert storage.list_names(storage.join(folder, "never there")) == []


def test_missing_files(folder: str) -> None:
    url = storage.join(folder, "nowhere")
    for call in (storage.size, storage.read_bytes):
        with pytest.raises(FileNotFoundError):
            call(url)


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "file")
    storage.write_bytes(url, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        storage.write_bytes(url, b"new")
    assert os.listdir(tmp_path) == ["file"] and storage.read_bytes(url) == b"old"


def test_names_of_urls() -> None:
    assert storage.is_local("a/b") and storage.is_local("file:///a") and not storage.is_local("s3://bucket/a")
    assert storage.local_path("file:///a/b") == "/a/b"
    assert storage.parent("s3://bucket/a/m.json") == "s3://bucket/a" and storage.name("s3://bucket/a/") == "a"
    assert storage.parent("m.json") == "" and storage.join("", "x.tar") == "x.tar"


def test_an_unknown_protocol_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="no file system for nosuch://"):
        storage.exists("nosuch://a")
