"""The README's tree names every file of the program."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _tree() -> str:
    text = (ROOT / "README.md").read_text()
    return text[text.index("```\nimm_scale/") :]


@pytest.mark.parametrize("room", ["imm_scale", "launchers", "data_tools", "experiments", "benchmarks"])
def test_the_tree_names_every_file(room):
    folder = ROOT / room
    files = [path.relative_to(folder) for path in folder.rglob("*.py") if not path.name.startswith("__")]
    missing = [str(path) for path in files if str(path) not in _tree()]
    assert files and not missing, f"README.md lacks {missing}"


def test_the_tree_names_no_file_that_is_gone():
    words = [
        line.split()[0] for line in _tree().splitlines() if line.startswith("  ") and line.split()[0].endswith(".py")
    ]
    rooms = ("imm_scale", "launchers", "data_tools", "experiments")
    assert [word for word in words if not any((ROOT / room / word).exists() for room in rooms)] == []
