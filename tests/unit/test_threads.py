"""CUDA's current device belongs to a thread: one that does not choose works on GPU 0 and makes a context there."""

import ast
import threading
from pathlib import Path

import torch

from imm_scale import devices
from imm_scale.checkpoint import format as checkpoints
from tests import ranks
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
FILES_ONLY = {  # threads that read and write files, or decode images, in NumPy's memory
    "imm_scale/checkpoint/format.py: commit",
    "imm_scale/checkpoint/run_lock.py: keep",
    "imm_scale/data/dataset.py: __init__",
    "imm_scale/data/blocks/window.py: __init__",
    "data_tools/encode.py: _finished",
    "data_tools/encode.py: encode_shards",
    "data_tools/encode.py: read_batches",
    "data_tools/packing/contact_sheet.py: _sheet",
}


def _starts(path: Path) -> list[tuple[str, str]]:
    """(place, source of the call) of everything in a file that starts threads."""
    starts = []
    text = path.read_text()
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("Thread", "ThreadPoolExecutor"):
                starts.append((f"{path.relative_to(ROOT)}: {function.name}", ast.unparse(node)))
    return starts


def test_every_thread_that_may_touch_cuda_chooses_its_gpu_first():
    """By an initializer of the pool, or by a target that the tests below see do it."""
    places = [
        start
        for folder in ("imm_scale", "data_tools", "launchers")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for start in _starts(path)
    ]
    open_places = {place for place, call in places if "use_device" not in call and place not in FILES_ONLY}
    assert open_places <= {
        "imm_scale/checkpoint/async_saver.py: save",
        "imm_scale/training/watchdog.py: __init__",
        "imm_scale/data/prefetch.py: __init__",
    }


def _train_and_note(argv: list[str]) -> set[tuple[str, str]]:
    """The threads that chose a device, and which."""
    noted: set[tuple[str, str]] = set()

    def note(device: torch.device) -> None:
        noted.add((threading.current_thread().name, str(device)))

    devices.use_device = note
    assert ranks.command("train", *argv) == 0
    return noted


def test_the_saver_and_the_watchdog_choose(digits, tmp_path):
    argv = [*TINY, f"data.manifest={digits}", f"run.dir={tmp_path}/run", "train.max_steps=1"]
    (noted,) = ranks.run(_train_and_note, 1, argv)
    assert {("saver", "cpu"), ("watchdog", "cpu")} <= noted


def test_threads_that_load_a_remote_checkpoint_choose_the_gpu_they_fill(monkeypatch):
    noted: list[tuple[bool, str]] = []
    monkeypatch.setattr(checkpoints.storage, "is_local", lambda url: False)
    monkeypatch.setattr(
        devices,
        "use_device",
        lambda device: noted.append((threading.current_thread() is threading.main_thread(), str(device))),
    )

    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 5)

        def numel(self) -> int:
            return 3

        def copy_(self, values: torch.Tensor) -> None:
            assert noted

    class Stored:
        url = "s3://bucket/checkpoint"

        def read(self, *place: object) -> torch.Tensor:
            return torch.zeros(3)

    checkpoints.load_into([("weight", "a", 0, OnGpu())], Stored())  # type: ignore[list-item,arg-type]
    assert noted == [(False, "cuda:5")]
