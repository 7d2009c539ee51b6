"""What benchmarks/structure.py counts, on a tree counted by hand; and this tree held to its goals."""

from pathlib import Path

import pytest

from benchmarks import structure
from benchmarks.structure import Tree

ROOT = Path(__file__).parents[2]

FILES = {
    "__init__.py": "",
    "top.py": "from box.left import one\n\ndef main():\n    '''Says it.'''\n    return one\n",
    "left/__init__.py": "",
    "left/one.py": "from box.right.two import Two\n\ndef plain(x):\n    return x\n\ndef _hidden(x):\n    return x\n",
    "left/three.py": "from . import one\nimport box.top\n",
    "left/test_one.py": "def test(): pass\n",
    "right/__init__.py": "",
    "right/two.py": """
class Two:
    def kept(self, x_NC: Tensor) -> Tensor:
        '''Of the base.'''
        def inner():
            return 1
        return inner()

    @property
    def size(self): return 2

    @size.setter
    def size(self, value): pass


class Three(Two):
    def kept(self, x: Tensor) -> Tensor:
        return x

    def own(self, x: Tensor) -> Tensor:
        '''Gives (N, C).'''

    def bare(self, x: Tensor) -> Tensor:
        '''Gives something.'''

def late():
    '''Imports inside.'''
    import box.left.one
""",
}


@pytest.fixture
def box(tmp_path: Path) -> Tree:
    for name, text in FILES.items():
        path = tmp_path / "box" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Tree(tmp_path / "box")


def test_lengths_and_folders(box):
    assert sorted(box.file_lengths) == [2, 5, 7, 28], "empty files and tests do not count"
    lengths = {function.name: function.length for function in box.functions}
    assert lengths["Two.kept"] == 5
    assert lengths["Two.kept.inner"] == 2
    assert lengths["main"] == 3
    assert len(box.functions) == 11
    assert box.modules_a_folder == {".": 1, "left": 2, "right": 1}


def test_imports(box):
    imports = {(str(one), str(other)) for one, other in box.imports}
    assert imports == {
        ("top.py", "left/one.py"),
        ("left/one.py", "right/two.py"),
        ("left/three.py", "left/one.py"),
        ("left/three.py", "top.py"),
        ("right/two.py", "left/one.py"),
    }
    assert box.mutual_files == {("left/one.py", "right/two.py")}
    assert box.mutual_folders == {("left", "right")}, "a file at the top is in no folder"


def test_docstrings_and_shapes(box):
    assert [function.name for function in box.public] == [
        "plain",
        "Two.kept",
        "Two.size",
        "Three.own",
        "Three.bare",
        "late",
        "main",
    ]
    assert [function.name for function in box.undocumented] == ["plain", "Two.size"]
    assert [function.name for function in box.without_shapes] == ["Three.bare"]


@pytest.mark.parametrize(("percent", "length"), [(50, 5), (90, 9), (91, 10)])
def test_percentiles_are_lengths_that_are_there(percent, length):
    assert structure.percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == length


# --- this tree ---


@pytest.fixture(scope="module")
def trees() -> list[Tree]:
    return [Tree(ROOT / name) for name in ("imm_scale", "data_tools", "launchers")]


def test_functions_and_files_are_short(trees):
    assert structure.percentile([function.length for tree in trees for function in tree.functions], 90) <= 20
    assert structure.percentile([length for tree in trees for length in tree.file_lengths], 90) <= 300


def test_no_folder_holds_more_than_fourteen_modules(trees):
    for tree in trees:
        assert {folder: count for folder, count in tree.modules_a_folder.items() if count > 14} == {}


def test_neither_files_nor_folders_import_each_other(trees):
    for tree in trees:
        assert tree.mutual_files == tree.mutual_folders == set()


def test_public_functions_have_docstrings(trees):
    missing = [f"{tree.root.name}/{one.where} {one.name}" for tree in trees for one in tree.undocumented]
    assert len(missing) <= 0.05 * sum(len(tree.public) for tree in trees), "\n".join(missing)
