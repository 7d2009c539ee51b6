"""docs/architecture.md names every module of the package, in its room."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _named() -> set[str]:
    """Paths below imm_scale/ as the list of rooms gives them."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = text[text.index("```\nerrors.py") :].split("```")[1]
    named, room, inner = set(), "", ""
    for line in listed.splitlines():
        if line[:1].strip():
            first = line.split()[0]
            room, inner = first if first.endswith("/") else "", ""
        for word in re.findall(r"[a-z_0-9]+/|[a-z_0-9]+\.py|\)", line.removeprefix(room)):
            inner = word if word.endswith("/") else "" if word == ")" else inner
            named |= {f"{room}{inner}{word}"} if word.endswith(".py") else set()
    return named


def test_the_rooms_name_every_module_and_no_other():
    package = ROOT / "imm_scale"
    there = {str(path.relative_to(package)) for path in package.rglob("*.py") if not path.name.startswith("__")}
    assert _named() == there
