import errno
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest

from imm_scale.data.blocks.cache import BlockCache
from imm_scale.errors import UserError

SIZE = 1000


def _content(key: str) -> bytes:
    return random.Random(key).randbytes(SIZE)


def _bytes(folder: Path) -> int:
    """Under the lock, so that nobody changes the folder meanwhile."""
    with BlockCache(str(folder), 1)._locked():
        return sum(path.stat().st_size for path in folder.glob("*.block"))


def test_entries_come_back_and_the_longest_unused_go(tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path), 10 * SIZE)
    for i in range(10):
        cache.put(f"k{i}", _content(f"k{i}"))
        os.utime(tmp_path / f"k{i}.block", (i, i))
    assert cache.get("k0") == _content("k0")  # used just now
    cache.put("k10", _content("k10"))
    assert cache.get("k1") is None and cache.get("k0") is not None and cache.get("k10") is not None
    assert _bytes(tmp_path) <= 10 * SIZE
    cache.drop("k10")
    cache.drop("k10")
    assert cache.get("k10") is None
    cache.put("large", bytes(11 * SIZE))
    assert cache.get("large") is None


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_bytes is 0"):
        BlockCache(str(tmp_path), 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file cannot be used"):
        BlockCache(str(tmp_path / "file"), 10)


def _write_for_ever(folder: str, seed: int) -> None:
    cache, keys = BlockCache(folder, 20 * SIZE), random.Random(seed)
    while True:
        key = f"k{keys.randrange(100)}"
        cached = cache.get(key)
        assert cached is None or cached == _content(key)
        cache.put(key, _content(key))


def test_concurrent_writers_and_kills_leave_whole_entries_within_the_bound(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    moments = random.Random(0)
    for round_ in range(8):
        writers = [context.Process(target=_write_for_ever, args=(str(tmp_path), 10 * round_ + i)) for i in range(3)]
        for writer in writers:
            writer.start()
        time.sleep(0.05 + 0.1 * moments.random())
        assert _bytes(tmp_path) <= 20 * SIZE
        for writer in writers:
            assert writer.is_alive()
            assert writer.pid is not None
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        for path in tmp_path.glob("*.block"):
            assert path.read_bytes() == _content(path.stem)
    cache = BlockCache(str(tmp_path), 20 * SIZE)
    assert not list(tmp_path.glob("*.tmp"))
    assert int((tmp_path / "total").read_text()) == _bytes(tmp_path)
    cache.put("after", _content("after"))
    assert cache.get("after") == _content("after")


def _fill_without_room(folder: str) -> list[bytes | None]:
    """What is kept by a process whose files may grow to 4 KiB only, as under a quota."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    cache = BlockCache(folder, 1 << 20)
    for key, size in (("small", 1000), ("large", 10_000), ("next", 1000)):
        cache.put(key, bytes([len(key)]) * size)
    return [cache.get(key) for key in ("small", "large", "next")]


def test_a_disk_without_room_ends_caching_and_not_training(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        kept = pool.apply(_fill_without_room, (str(tmp_path),))
    assert kept == [b"\x05" * 1000, None, None], "nothing half-written is taken for a block"
    again = BlockCache(str(tmp_path), 1 << 20)
    again.put("large", b"x" * 10_000)
    assert again.get("large") == b"x" * 10_000
    assert not list(tmp_path.glob("*.tmp"))


def test_that_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cache = BlockCache(str(tmp_path), 1 << 20)

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    monkeypatch.setattr(os, "replace", full)
    for key in "ab":
        cache.put(key, b"x")
    assert caplog.text.count("takes no more blocks") == 1 and "No space left" in caplog.text
