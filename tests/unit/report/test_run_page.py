"""The page about runs, looked at in a real browser."""

import json
from pathlib import Path

import pytest

from imm_scale.report import runs
from tests import ranks
from tests.browser import Browser


def test_the_page_is_whole_and_readable(trained, tmp_path):
    argv = ["evaluate", trained, "--steps", "1", "--repeats", "1", "--num", "64"]
    assert ranks.run(ranks.command, 1, *argv) == [0]
    assert ranks.run(ranks.command, 1, "sample", trained, "--steps", "1", "--num", "10") == [0]
    out = tmp_path / "page.html"
    runs.write_report([trained], str(out))
    drawn = 2 + len(list(Path(trained).glob("samples/*/*.png")))  # distances and curves, and the sheets
    with Browser() as browser:
        for width in (1280, 400):
            seen = browser.look(out, width)
            assert seen["pictures"] == drawn
            assert seen["broken"] == []
            assert seen["overflow"] <= 0, "the page must not scroll sideways"
            assert seen["least_text"] >= 12
            assert json.loads((Path(trained) / "status.json").read_text())["state"] == "completed"
            assert "frechet_latents" in seen["text"]
            assert "the average of decay 0.99 is still 98% initial weights at step 2" in seen["text"]
        assert browser.complaints == []


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("steps-1.png", "1 step"),
        ("steps-2-guidance-1.5.png", "2 steps, guidance 1.5"),
        ("steps-2-seed-5.png", "2 steps, seed 5"),
        ("steps-4-guidance-2-ema-0.99.png", "4 steps, guidance 2 ema 0.99"),
    ],
)
def test_a_sheet_is_called_by_what_it_shows(name, caption):
    assert runs._caption(name) == caption


def test_a_broken_page_is_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<p style='font-size:9px;width:2000px'>x</p><img alt=gone src='data:image/png;base64,AAAA'>"
        "<script>console.error('no'); throw new Error('never')</script>"
    )
    with Browser() as browser:
        seen = browser.look(page, 400)
        assert seen["broken"] == ["gone"]
        assert seen["overflow"] > 1000
        assert seen["least_text"] == 9
        assert len(browser.complaints) >= 2
