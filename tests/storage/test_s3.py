"""Whole-file storage on a real S3 server: faults pass unnoticed, mistakes are named at once."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_tools import pack_tokens
from imm_scale import storage
from imm_scale.data.dataset import Dataset
from imm_scale.errors import UserError
from imm_scale.storage import retries
from tests.storage.conftest import use_store
from tests.storage.fault_proxy import Faults, Proxy
from tests.storage.seaweed import SECRET_KEY, Server

DATA = bytes(range(256)) * 64


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retries, "POLICY", retries.RetryPolicy(seconds=60, first_pause=0.02, longest_pause=0.5))
    yield


def test_files_come_back(bucket: str) -> None:
    url = storage.join(bucket, "folder", "file")
    storage.write_bytes(url, DATA)
    assert storage.read_bytes(url) == DATA and storage.size(url) == len(DATA) and storage.exists(url)
    assert storage.read_range(url, 100, 300) == DATA[100:300]
    assert storage.read_range(url, len(DATA) - 5, len(DATA) + 100) == DATA[-5:]
    assert storage.read_range(url, len(DATA) + 5, len(DATA) + 100) == b""
    assert storage.list_names(storage.join(bucket, "folder")) == ["file"]
    assert storage.list_names(storage.join(bucket, "nowhere")) == []
    storage.remove(storage.join(bucket, "folder"))
    storage.remove(storage.join(bucket, "folder"))
    assert not storage.exists(url)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(url)


def test_tokens_are_packed_into_a_bucket_and_read_from_it(bucket: str, tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_bytes(bytes(range(i, i + 40)))
    words = ["--source", str(tmp_path), "--length", "8", "--shard-samples", "20"]
    local, remote = str(tmp_path.parent / "tokens"), storage.join(bucket, "tokens")
    for out in (local, remote, remote):  # the second time it finds itself finished
        assert pack_tokens.main([*words, "--out", out]) == 0
    for part in ("manifest.json", "heldout/manifest.json"):
        here, there = (Dataset(storage.join(out, part)) for out in (local, remote))
        assert here.manifest == there.manifest
        rows = [np.concatenate([shard.read(0, len(shard.index)) for shard in one.shards]) for one in (here, there)]
        np.testing.assert_array_equal(*rows)


def _into(url: str, start: int, length: int) -> bytes:
    buffer = bytearray(length)
    return bytes(buffer[: storage.read_into(url, start, memoryview(buffer))])


def test_ranges_are_read_into_memory(bucket: str) -> None:
    url = storage.join(bucket, "a folder", "file+1 %.tar")
    storage.write_bytes(url, DATA)
    for start, length in ((0, 5), (100, 9000), (len(DATA) - 5, 100), (0, 2 * len(DATA)), (len(DATA), 5), (10**9, 5)):
        assert _into(url, start, length) == DATA[start : start + length]
    with pytest.raises(FileNotFoundError):
        _into(storage.join(bucket, "nothing"), 0, 5)


def test_of_several_creators_one_wins(bucket: str) -> None:
    url = storage.join(bucket, "once")
    won: list[bool] = []
    threads = [threading.Thread(target=lambda i=i: won.append(storage.create_bytes(url, b"%d" % i))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won) == 1 and len(won) == 6
    content = storage.read_bytes(url)
    assert not storage.create_bytes(url, b"late") and storage.read_bytes(url) == content


def test_faults_are_tried_again_and_told(
    bucket: str, server: Server, proxy: Proxy, short_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_store(server.env(proxy.port), monkeypatch)
    proxy.faults = Faults(busy=0.2, cut=0.2, slow=0.02, spike_seconds=0.5)
    told: Counter[str] = Counter()
    for i in range(30):
        url = storage.join(bucket, f"file-{i}")
        storage.write_bytes(url, DATA)
        read = storage.read_range(url, i, 9000, lambda error: told.update([type(error).__name__]))
        assert read == DATA[i:9000] == _into(url, i, 9000 - i)
    assert proxy.faults.done["busy"] > 5 and proxy.faults.done["cut"] > 5
    assert sum(told.values()) > 5, told


def test_patience_ends(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr(retries, "POLICY", retries.RetryPolicy(seconds=1, first_pause=0.05, longest_pause=0.2))
    use_store(server.env(1), monkeypatch)  # nothing listens on port 1
    began = time.monotonic()
    with pytest.raises(OSError, match=r"s3://b/file: EndpointConnectionError, still after \d+ tries in 1 s"):
        storage.read_bytes("s3://b/file")
    with pytest.raises(OSError, match=r"s3://b/file: ConnectionError, still after \d+ tries in 1 s"):
        _into("s3://b/file", 0, 5)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("wrong", [{"AWS_SECRET_ACCESS_KEY": "notthesecret"}, {"AWS_ACCESS_KEY_ID": "nobody"}])
def test_wrong_credentials_are_one_clear_error(
    wrong: dict[str, str], bucket: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_store({**server.env(), **wrong}, monkeypatch)
    url = storage.join(bucket, "file")
    calls = (
        storage.read_bytes,
        storage.size,
        storage.exists,
        lambda url: storage.write_bytes(url, DATA),
        lambda url: _into(url, 0, 5),
    )
    for call in calls:
        began = time.monotonic()
        with pytest.raises(UserError, match=r"access refused .*AWS_ACCESS_KEY_ID") as caught:
            call(url)
        assert time.monotonic() - began < 5
        assert not any(secret in str(caught.value) for secret in (SECRET_KEY, "notthesecret", "nobody"))


def test_missing_credentials_and_buckets(bucket: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for read in (storage.read_bytes, lambda url: _into(url, 0, 5)):
        with pytest.raises(UserError, match=r"s3://nosuchbucket/file: the bucket does not exist"):
            read("s3://nosuchbucket/file")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    use_store({}, monkeypatch)
    for read in (storage.read_bytes, lambda url: _into(url, 0, 5)):
        with pytest.raises(UserError, match="no credentials"):
            read(storage.join(bucket, "file"))


def test_no_password_of_a_url_is_shown() -> None:
    assert storage.shown("ftp://me:secret@host/file") == "ftp://host/file"
