"""The page that keeps up with runs: it is there before they are, reloads while they train, and then stands still."""

import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imm_scale import cli, storage
from imm_scale.checkpoint import format as checkpoints
from imm_scale.checkpoint import run_folder
from imm_scale.errors import UserError
from imm_scale.report import progress
from imm_scale.report.watch import watch
from tests import ranks
from tests.browser import Browser

CPU = torch.device("cpu")
RELOADS = re.compile(r'<meta http-equiv="refresh" content="(\d+)">')


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A run of two steps whose folder the test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def _watch(run_dirs, out: Path, until, events=(), draw=None) -> tuple[list[str], list[str]]:
    """The pages as they stood at each pause and at the end, and what was said; a pause lets the next event happen."""
    pages, said, waiting = [], [], iter(events)

    def pause(seconds: float) -> None:
        pages.append(out.read_text())
        next(waiting)()

    watch(list(map(str, run_dirs)), str(out), until, draw, said.append, 7.0, pause)
    return [*pages, out.read_text()], said


def test_the_page_reloads_until_the_last_run_has_ended(run, tmp_path):
    late = tmp_path / "late"
    run_folder.write_status(str(run), "running", step=1)
    events = [
        lambda: run_folder.write_status(str(run), "completed", step=2),
        lambda: shutil.copytree(run, late),
    ]
    pages, _ = _watch([run, late], tmp_path / "page.html", "trained", events)
    assert [RELOADS.findall(page) for page in pages] == [["7"], ["7"], []]
    assert [f"{late} has not started yet" in page for page in pages] == [True, True, False]
    assert "is running: step 2 of 2" in pages[0]
    assert pages[2].count("is completed: step 2 of 2") == 2


@pytest.mark.parametrize("state", ["completed", "failed"])
def test_a_run_that_is_to_be_evaluated_ends_with_its_last_measure_or_its_failure(run, tmp_path, state):
    run_folder.write_status(str(run), state, step=2)
    counts = [1, 2, 4, 8]  # evaluation.steps

    def measure(*steps: int):
        return lambda: ranks.run(ranks.command, 1, "evaluate", str(run), *_few(steps))

    events = [measure(1, 2), measure(4, 8)] if state == "completed" else []
    pages, _ = _watch([run], tmp_path / "page.html", "evaluated", events)
    assert len(pages) == 1 + len(events)
    assert all(RELOADS.search(page) for page in pages[:-1])
    assert not RELOADS.search(pages[-1])
    assert all(f"<td>{n}</td>" in pages[-1] for n in counts) == (state == "completed")


def _few(steps) -> list[str]:
    return ["--steps", ",".join(map(str, steps)), "--repeats", "1", "--num", "64"]


def test_the_page_of_no_run_yet_is_whole_in_a_browser(tmp_path):
    out = tmp_path / "page.html"
    with pytest.raises(StopIteration):
        _watch([tmp_path / "none"], out, "trained")
    with Browser() as browser:
        assert "has not started yet" in browser.look(out, 400)["text"]
        assert browser.complaints == []


# --- samples of every checkpoint ---


def test_every_checkpoint_is_drawn_once_and_shown(run, tmp_path):
    drawn = []

    def draw(run_dir: str) -> None:
        progress.draw_missing(run_dir, CPU)
        drawn.append(os.listdir(run / "progress"))

    run_folder.write_status(str(run), "running", step=2)
    event = lambda: run_folder.write_status(str(run), "completed", step=2)  # noqa: E731
    pages, said = _watch([run], tmp_path / "page.html", "trained", [event], draw)
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 1
    assert all("after 2 steps of training" in page for page in pages)
    assert said == []
    # As `imm-scale sample` draws them: the same noises, a row a step count.
    assert ranks.run(ranks.command, 1, "sample", str(run), "--steps", "1,8", "--num", "10") == [0]
    picture = np.asarray(Image.open(io.BytesIO((run / "progress" / drawn[0][0]).read_bytes())))
    for row, steps in ((0, 1), (3, 8)):
        images = np.load(run / "samples" / "step-00000002" / f"steps-{steps}.npz")["arr_0"]
        for column, image in enumerate(images):
            top, left = 4 * row * 9, 4 * column * 9  # 8 pixels and a line, enlarged by 4
            np.testing.assert_array_equal(picture[top : top + 32 : 4, left : left + 32 : 4], image[..., 0])


def test_a_step_trained_anew_is_drawn_anew(run):
    progress.draw_missing(str(run), CPU)
    before = os.listdir(run / "progress")
    (run / "progress" / "step-00000009-0123456789ab.png").write_bytes(b"of a run that went further")
    committed = Path(checkpoints.folder(str(run), 2)) / checkpoints.COMMITTED
    committed.write_text(committed.read_text() + " ")
    progress.draw_missing(str(run), CPU)
    after = os.listdir(run / "progress")
    assert len(after) == 1
    assert after != before


def test_a_checkpoint_removed_while_it_is_read_is_left_out(run, monkeypatch):
    steps = checkpoints.committed_steps(str(run))
    shutil.rmtree(checkpoints.folder(str(run), 2))
    listed = iter([steps, []])
    monkeypatch.setattr(progress.checkpoints, "committed_steps", lambda run_dir: next(listed))
    progress.draw_missing(str(run), CPU)
    assert storage.list_names(str(run / "progress")) == []


def test_what_cannot_be_drawn_is_said_once_and_the_page_goes_on(run, tmp_path):
    def draw(run_dir: str) -> None:
        raise UserError("sample 3 is not finite")

    run_folder.write_status(str(run), "running", step=2)
    event = lambda: run_folder.write_status(str(run), "completed", step=2)  # noqa: E731
    pages, said = _watch([run], tmp_path / "page.html", "trained", [event], draw)
    assert len(pages) == 2
    assert said == [f"no more samples are drawn of {run}: sample 3 is not finite"]


# --- the command ---


def test_the_address_comes_first_and_the_table_last(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder.write_status(str(run), "completed", step=2)
    assert cli.main(["report", str(run), "--watch", "--draw", "--out", "a page.html"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"file://{tmp_path}/a%20page.html ")
    assert lines[-1] == "a page.html"
    assert not RELOADS.search((tmp_path / "a page.html").read_text())


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        (["--draw"], "--draw is for --watch"),
        (["--until", "trained"], "--until is for --watch"),
        (["--poll", "5"], "--poll is for --watch"),
        (["--watch", "--poll", "0"], "--poll 0: give seconds above 0"),
        (["--watch", "--poll", "nan"], "--poll nan: give seconds above 0"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(trained, tmp_path, capsys, flags, phrase):
    assert cli.main(["report", trained, "--out", str(tmp_path / "page.html"), *flags]) == 2
    assert phrase in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_final_page_is_of_runs_that_are_there(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "page.html")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
