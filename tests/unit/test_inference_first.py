"""docs/inference_first.md says nothing of results that the pages it leads to do not say."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
DOOR = DOCS / "inference_first.md"
_LINK = re.compile(r"\]\(([a-z_]+\.md)(?:#[^)]*)?\)")
_FIGURE = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)")  # measured figures have a point; steps and blocks do not


def _paragraphs() -> list[str]:
    blocks = re.split(r"\n(?=- )|\n\n", DOOR.read_text())
    return [" ".join(block.split()) for block in blocks if not block.startswith(("#", "|", "!"))]


def test_each_paragraph_with_a_figure_leads_to_its_page():
    with_figures = [text for text in _paragraphs() if _FIGURE.search(text)]
    assert len(with_figures) >= 8, "the page is about measurements"
    for text in with_figures:
        pages = [(DOCS / name).read_text() for name in _LINK.findall(text)]
        assert pages, f"figures without the page they are from: {text}"
        for figure in _FIGURE.findall(text):
            stands = re.compile(rf"(?<![\d.]){re.escape(figure)}(?!\d)")
            assert any(stands.search(page) for page in pages), f"{figure} is on none of its pages: {text}"


@pytest.mark.parametrize(
    "page", ["second_time.md", "results.md", "flow_maps.md", "joint_tokens.md", "two_axes.md", "mathematics.md"]
)
def test_it_leads_to_all_of_it(page):
    assert page in _LINK.findall(DOOR.read_text())
