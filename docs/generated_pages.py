"""Pages of the site that are no files of docs/: the README and its like, and an API page for each room.

A hook of mkdocs. A room that the navigation of mkdocs.yml does not list, or a link of the README that leads to no page,
is a warning, which `make docs` takes for an error.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "imm_scale"
SURFACE = ("api", "errors")
LINKS = {"](docs/": "](", "](CITATION.cff)": "](#cite)"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to those of docs/."""
    for uri, text in {**_from_root(), **_api()}.items():
        files.append(File.generated(config, uri, content=text))
    return files


def _from_root() -> dict[str, str]:
    """Pages that stand at the top of the checkout, with links that hold from the site's top."""
    pages = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
    return {uri: _with_links((ROOT / name).read_text()) for uri, name in pages.items()}


def _with_links(text: str) -> str:
    for old, new in LINKS.items():
        text = text.replace(old, new)
    return text


def _api() -> dict[str, str]:
    rooms = sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
    pages = {f"api/{room.name}.md": _page(room.name, _modules(room)) for room in rooms}
    for name in ("launchers", "data_tools"):
        pages[f"api/{name}.md"] = _page(name, _modules(ROOT / name))
    between = [name for name in _modules(PACKAGE, "*.py") if name.split(".")[1] not in SURFACE]
    pages["api/between.md"] = _page("Between the rooms", between)
    pages["api/index.md"] = _page("Python API", ["imm_scale", "imm_scale.errors"])
    return pages


def _modules(folder: Path, pattern: str = "**/*.py") -> list[str]:
    paths = sorted(path.relative_to(ROOT) for path in folder.glob(pattern) if not path.name.startswith("__"))
    return [".".join(path.with_suffix("").parts) for path in paths]


def _page(title: str, modules: list[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)]) + "\n"
