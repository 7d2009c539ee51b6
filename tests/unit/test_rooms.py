"""docs/architecture.md names every module of the package in its room, and docs/mathematics.md code that is there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHODS = ROOT / "imm_scale" / "methods"


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


def _mathematics() -> list[str]:
    """What the table of symbols points to."""
    rows = [line for line in (ROOT / "docs" / "mathematics.md").read_text().splitlines() if line.startswith("|")]
    code = [word for line in rows for word in re.findall(r"`([A-Za-z_]\w+\.\w+)`", line.rsplit("|", 2)[-2])]
    assert len(code) > 10
    return code


@pytest.mark.parametrize("name", _mathematics())
def test_the_mathematics_point_to_code(name):
    home, part = name.split(".")
    paths = [*METHODS.rglob("*.py"), *(ROOT / "imm_scale" / "models").glob("*.py")]
    dotted = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    modules = [importlib.import_module(name.removesuffix(".__init__")) for name in dotted]
    homes = [module for module in modules if module.__name__.endswith(f".{home}")]
    homes += [getattr(module, home) for module in modules if hasattr(module, home)]
    assert any(hasattr(one, part) for one in homes), f"docs/mathematics.md: {name}"
