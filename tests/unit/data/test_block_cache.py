import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from imm_scale.data.block_cache import BlockCache
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
