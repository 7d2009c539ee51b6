"""An interrupted job goes on after its last whole shard; a full disk is a message, and leaves nothing half-written."""

import errno
import json
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from data_tools import encode, images, pack
from imm_scale import storage
from tests.unit.data_tools.sources import trees
from tests.unit.test_errors import file_size_limit


@pytest.fixture
def source(tmp_path: Path) -> Path:
    files = {f"{'ab'[i % 2]}/{i}.png".encode(): trees.png(i) for i in range(11)}
    files |= {b"a/broken.png": files[b"a/0.png"][:60], b"b/no.png": b"no image"}
    return trees.as_folder(tmp_path / "source", files)


def _pack(source: Path, out: Path, *more: object) -> int:
    return pack.main(["--source", str(source), "--out", str(out), "--shard-samples", "3", *map(str, more)])


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("after", [1, 5, 9, 12])
def test_ctrl_c_and_the_same_command(tmp_path, source, capsys, monkeypatch, after):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert _pack(source, whole) == 0
    rendered = 0
    render = images.render

    def interrupted(*args, **options):
        nonlocal rendered
        rendered += 1
        if rendered == after:
            signal.raise_signal(signal.SIGINT)
        return render(*args, **options)

    monkeypatch.setattr(images, "render", interrupted)
    assert _pack(source, out) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert not (out / "pack.json").exists()
    rendered = 100
    assert _pack(source, out) == 0
    shards = max(0, (after - 4) // 3)  # two of the 13 are bad, and a full shard waits for the image after it
    assert rendered - 100 <= 13 - 3 * shards, "what is in whole shards is not rendered again"
    assert _contents(out) == _contents(whole)


@pytest.mark.parametrize(
    "failing", ["images-000000.tar", "images-000002.tar", "images-000001.json", "contact-000.png", "pack.json"]
)
def test_a_full_disk_at_any_file(tmp_path, source, capsys, monkeypatch, failing):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert _pack(source, whole) == 0
    write = storage.write_bytes

    def full(url: str, data: bytes) -> None:
        if url.endswith(failing):
            raise OSError(errno.ENOSPC, "No space left on device", url)
        write(url, data)

    for module in ("imm_scale.storage.write_bytes", "imm_scale.storage.files.write_bytes"):
        monkeypatch.setattr(module, full)
    assert _pack(source, out) == 2
    message = capsys.readouterr().err
    assert f"{out}/{failing}: the disk is full; free some space" in message and "Traceback" not in message
    assert not (out / "pack.json").exists()
    monkeypatch.undo()
    assert _pack(source, out) == 0
    assert _contents(out) == _contents(whole)


def test_a_limit_of_file_sizes(tmp_path, source, capsys):
    out = tmp_path / "out"
    with file_size_limit(2000):
        assert _pack(source, out) == 2
    assert "images-000000.tar: no file may grow that large here" in capsys.readouterr().err
    assert _pack(source, out) == 0
    latents = tmp_path / "latents"
    arguments = ["--images", str(out), "--out", str(latents), "--codec", "pixels"]
    with file_size_limit(2000):
        assert encode.main(arguments) == 2
    assert "latents-000000.tar: no file may grow that large here" in capsys.readouterr().err
    assert not any(path.name.startswith("manifest") for path in latents.iterdir())
    assert encode.main(arguments) == 0


def test_what_belongs_to_another_job_is_not_gone_on_with(tmp_path, source, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert _pack(source, out, "--max-bad", 1) == 2
    assert any(path.suffix == ".json" for path in out.iterdir())
    assert _pack(source, out, "--size", 4) == 0
    assert "goes on" not in capsys.readouterr().out
    assert _pack(source, whole, "--size", 4) == 0
    assert _contents(out) == _contents(whole)


def test_a_shard_that_was_damaged_meanwhile_is_written_again(tmp_path, source, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert _pack(source, whole) == 0
    assert _pack(source, out, "--max-bad", 1) == 2
    (out / "images-000000.tar").write_bytes(b"short")
    capsys.readouterr()
    assert _pack(source, out) == 0
    assert "goes on" not in capsys.readouterr().out
    assert _contents(out) == _contents(whole)


def test_records_say_where_the_first_images_of_each_class_lie(tmp_path, source):
    out = tmp_path / "out"
    assert _pack(source, out, "--max-bad", 1) == 2
    record = json.loads((out / "images-000000.json").read_text())
    shard = (out / "images-000000.tar").read_bytes()
    for example in record["examples"]:
        assert shard[example["offset"] :][:8] == b"\x89PNG\r\n\x1a\n"
        assert shard[example["offset"] :][: example["size"]].endswith(b"IEND\xaeB`\x82")
    assert sum(record["labels"].values()) == len(record["examples"]) == 3


def test_a_killed_worker_is_a_message(tmp_path, source, capsys, monkeypatch):
    class Pool:
        def __init__(self, *_: object) -> None: ...

        def map(self, *_: object, **__: object) -> None:
            raise BrokenProcessPool("a process in the pool was terminated abruptly")

        def shutdown(self, **_: object) -> None: ...

    monkeypatch.setattr(pack, "ProcessPoolExecutor", Pool)
    assert _pack(source, tmp_path / "out", "--workers", 4) == 2
    assert "a process of --workers 4 was killed" in capsys.readouterr().err
