"""How a tree of Python is built: lengths, modules a folder, mutual imports, docstrings. Nothing in it is imported.

python -m benchmarks.structure [NAME=]FOLDER ...

prints a Markdown table with a column a folder. Tests (folders `tests`, files `test_*.py`) are left out.
"""

import argparse
import ast
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Pair = tuple[str, str]
_SHAPE = re.compile(r"[(\[](?:\.{3}|\*|[A-Za-z]\w?'?|num\w*|batch\w*|steps|\d+)(?: \+ 1)?,|\b(?:shapes?|scalar|flat)\b")
_SHAPE_SUFFIX = re.compile(r"_[A-Z]+$")
_TENSOR = re.compile(r"\b(Tensor|NDArray|ndarray)\b")


@dataclass(frozen=True)
class Function:
    """A function or method.

    Attributes:
        name: qualified by its classes.
        where: file and line.
        owner: the class around it.
        public: it and its classes have no leading underscore, and no function is around it.
    """

    node: FunctionNode
    name: str
    where: str
    owner: ast.ClassDef | None
    public: bool

    @property
    def length(self) -> int:
        """Lines from `def` to the end, docstring included, decorators not."""
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    @property
    def takes_tensors(self) -> bool:
        """Whether an argument or the result is annotated as a tensor or an array."""
        arguments = self.node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        annotations = [argument.annotation for argument in every] + [self.node.returns]
        return any(_TENSOR.search(ast.unparse(annotation)) for annotation in annotations if annotation is not None)

    @property
    def has_shapes(self) -> bool:
        """Whether its docstring or its class gives a shape, as in (N, C), or an argument's name ends in one (x_NC)."""
        names = [node.arg for node in ast.walk(self.node.args) if isinstance(node, ast.arg)]
        documented = [ast.get_docstring(node) or "" for node in (self.node, self.owner) if node is not None]
        return any(map(_SHAPE_SUFFIX.search, names)) or any(map(_SHAPE.search, documented))


class Tree:
    """The modules below a folder.

    Args:
        root: the folder; its modules are imported by names that start at it or inside it.

    Raises:
        SyntaxError: a file that this Python does not read.
    """

    def __init__(self, root: Path):
        self.root = root.resolve()
        paths = (path.relative_to(self.root) for path in sorted(self.root.rglob("*.py")))
        self.files = [path for path in paths if not _is_test(path)]
        self.modules = {path: ast.parse((self.root / path).read_text()) for path in self.files}

    @cached_property
    def functions(self) -> list[Function]:
        """All functions and methods, nested ones too."""
        return [function for path, module in self.modules.items() for function in _functions(module, str(path))]

    @property
    def file_lengths(self) -> list[int]:
        """Lines of each file that has any."""
        lengths = [len((self.root / path).read_text().splitlines()) for path in self.files]
        return [length for length in lengths if length]

    @property
    def modules_a_folder(self) -> dict[str, int]:
        """Modules in each folder, without `__init__.py` and `__main__.py`."""
        parents = sorted(str(path.parent) for path in self.files if not path.name.startswith("__"))
        return {parent: len(list(group)) for parent, group in itertools.groupby(parents)}

    # --- imports ---

    @cached_property
    def imports(self) -> set[tuple[Path, Path]]:
        """(importer, imported) among the files, imports inside functions too."""
        pairs = {(path, target) for path in self.files for target in self._imported(path)}
        return {(path, target) for path, target in pairs if path != target}

    def _imported(self, path: Path) -> Iterator[Path]:
        for node in ast.walk(self.modules[path]):
            if isinstance(node, ast.Import):
                names = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = ".".join(path.parent.parts[: len(path.parent.parts) - node.level + 1]) if node.level else ""
                module = ".".join(part for part in (package, node.module or "") if part)
                names = [(module, alias.name) for alias in node.names]
            else:
                continue
            for module, name in names:
                yield from self._resolve(module, name)

    def _resolve(self, module: str, name: str) -> Iterator[Path]:
        """The file of a submodule, or else of the module a name is taken from."""
        for candidate in ([f"{module}.{name}"] if name else []) + [module]:
            below = candidate.removeprefix(f"{self.root.name}.") if candidate != self.root.name else ""
            path = Path(*below.split("."))
            for file in (path.with_suffix(".py") if below else path, path / "__init__.py"):
                if file in self.modules:
                    yield file
                    return

    @property
    def mutual_files(self) -> set[Pair]:
        """Pairs of files that import each other."""
        return _mutual({(str(one), str(other)) for one, other in self.imports})

    @property
    def mutual_folders(self) -> set[Pair]:
        """Pairs of folders side by side of which files import each other's."""
        return _mutual({pair for one, other in self.imports if (pair := _siblings(one, other)) is not None})

    # --- docstrings ---

    @property
    def public(self) -> list[Function]:
        """Public functions, without special methods, overloads, setters, and overrides of what has a docstring."""
        return [one for one in self.functions if one.public and not _is_variant(one) and not self._is_inherited(one)]

    @cached_property
    def _classes(self) -> dict[str, list[ast.ClassDef]]:
        """By name; a name may stand in several files."""
        classes: dict[str, list[ast.ClassDef]] = {}
        for node in itertools.chain.from_iterable(map(ast.walk, self.modules.values())):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(node)
        return classes

    def _is_inherited(self, function: Function) -> bool:
        return function.owner is not None and any(
            node.name == function.node.name and ast.get_docstring(node)
            for base in self._bases(function.owner, {function.owner.name})
            for node in base.body
            if isinstance(node, FunctionNode)
        )

    def _bases(self, owner: ast.ClassDef, seen: set[str]) -> Iterator[ast.ClassDef]:
        """The classes of the tree that a class derives from, found by their names."""
        for node in owner.bases:
            name = ast.unparse(node).split("[")[0].split(".")[-1]
            for base in self._classes.get(name, []) if name not in seen else []:
                yield base
                yield from self._bases(base, {*seen, name})

    @property
    def undocumented(self) -> list[Function]:
        """Public functions without docstring."""
        return [function for function in self.public if not ast.get_docstring(function.node)]

    @property
    def without_shapes(self) -> list[Function]:
        """Public functions of tensors that give no shape."""
        return [function for function in self.public if function.takes_tensors and not function.has_shapes]


def _is_test(path: Path) -> bool:
    return "tests" in path.parts or path.name.startswith("test_") or path.name == "conftest.py"


def _functions(
    node: ast.AST, file: str, scope: str = "", owner: ast.ClassDef | None = None, public: bool = True
) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            here = public and not child.name.startswith("_")
            yield Function(child, f"{scope}{child.name}", f"{file}:{child.lineno}", owner, here)
            yield from _functions(child, file, f"{scope}{child.name}.", None, False)
        elif isinstance(child, ast.ClassDef):
            here = public and not child.name.startswith("_")
            yield from _functions(child, file, f"{scope}{child.name}.", child, here)
        else:
            yield from _functions(child, file, scope, owner, public)


def _is_variant(function: Function) -> bool:
    """An overload, or a property's setter."""
    decorators = [ast.unparse(node) for node in function.node.decorator_list]
    return any(text.split(".")[-1] in ("overload", "setter", "deleter") for text in decorators)


def _mutual(arrows: set[Pair]) -> set[Pair]:
    return {(one, other) for one, other in arrows if one < other and (other, one) in arrows}


def _siblings(one: Path, other: Path) -> Pair | None:
    """The folders side by side that hold two files; None where one of them lies beside the other's folder."""
    depth = 0
    while depth < min(len(one.parts), len(other.parts)) and one.parts[depth] == other.parts[depth]:
        depth += 1
    if len(one.parts) <= depth + 1 or len(other.parts) <= depth + 1:
        return None
    return str(Path(*one.parts[: depth + 1])), str(Path(*other.parts[: depth + 1]))


def percentile(lengths: Sequence[int], percent: float) -> int:
    """The least length that so many per cent do not exceed."""
    return int(np.percentile(lengths, percent, method="inverted_cdf"))


def share(some: Sequence[Function], every: Sequence[Function]) -> str:
    """As in `4 % of 250`."""
    return f"{100 * len(some) / len(every):.1f} % of {len(every)}" if every else "none there"


def rows(tree: Tree) -> dict[str, str]:
    """The table's rows for one tree."""
    functions = [function.length for function in tree.functions]
    fullest, modules = max(tree.modules_a_folder.items(), key=lambda item: item[1])
    with_tensors = [function for function in tree.public if function.takes_tensors]
    return {
        "files, lines": f"{len(tree.file_lengths)}, {sum(tree.file_lengths):,}",
        "functions": f"{len(functions):,}",
        "function: median, p90 lines": f"{percentile(functions, 50)}, {percentile(functions, 90)}",
        "file: median, p90 lines": f"{percentile(tree.file_lengths, 50)}, {percentile(tree.file_lengths, 90)}",
        "modules in the fullest folder": f"{modules} ({fullest})" if fullest != "." else f"{modules} (the top)",
        "pairs of files that import each other": str(len(tree.mutual_files)),
        "pairs of folders that do": str(len(tree.mutual_folders)),
        "public functions without docstring": share(tree.undocumented, tree.public),
        "public functions of tensors without shapes": share(tree.without_shapes, with_tensors),
    }


def table(columns: dict[str, dict[str, str]]) -> str:
    """A Markdown table."""
    names = list(columns)
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    lines += [f"| {row} | " + " | ".join(columns[name][row] for name in names) + " |" for row in columns[names[0]]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table of the folders."""
    parser = argparse.ArgumentParser("benchmarks.structure", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", metavar="[NAME=]FOLDER", help="a tree of Python, a column of the table")
    folders: list[str] = parser.parse_args(argv).folders
    columns = [text.partition("=")[::2] if "=" in text else (Path(text).name, text) for text in folders]
    for _, folder in columns:
        if not any(Path(folder).rglob("*.py")):
            parser.error(f"no Python files under {folder}")
    print(table({name: rows(Tree(Path(folder))) for name, folder in columns}))


if __name__ == "__main__":
    main()
