"""The direction of imports: backwards along the way of the data, and each big library behind one door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "imm_scale"
# The way of the data. A room may import the rooms above it and itself.
LAYERS = [
    {"errors"},
    {"choices", "shipped"},
    {"registry"},
    {"devices", "fusion", "precision", "rng", "storage"},
    {"config"},
    {"data"},
    {"models"},
    {"methods"},
    {"build"},
    {"parallel"},
    {"distributed", "planner"},
    {"preflight"},
    {"checkpoint"},
    {"training"},
    {"sampling"},
    {"evaluation"},
    {"sweeps"},
    {"report"},
    {"api", "doctor"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
DOORS = {
    "deepspeed": {"imm_scale/parallel/deepspeed_engine.py"},
    "fsspec": {"imm_scale/storage/files.py"},
    "webdataset": {"imm_scale/data/", "data_tools/"},
    "wandb": {"imm_scale/training/run_log.py"},
    "xformers": {"imm_scale/models/layers.py"},
    "diffusers": {"imm_scale/data/autoencoder.py", "imm_scale/checkpoint/standalone/"},
    "tokenizers": {"imm_scale/data/tokens/tokenizers.py"},
    "shtab": {"imm_scale/commands/completion.py"},
    "transformers": {"imm_scale/evaluation/foreign/hugging_face.py"},
    "onnxruntime": {"imm_scale/evaluation/networks.py"},
}


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _layer(module: str) -> int:
    """The layer of "training.checkpoint.Checkpoint" or the like: the longest room that contains it."""
    rooms = [(room, depth) for depth, layer in enumerate(LAYERS) for room in layer]
    matching = [(len(room), depth) for room, depth in rooms if module == room or module.startswith(f"{room}.")]
    assert matching, f"imm_scale.{module} stands in no layer: give it one"
    return max(matching)[1]


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_backwards(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    if module == "__init__":
        return
    here, room = _layer(module), module.split(".")[0]
    for name in _imports(path):
        if name.startswith("imm_scale."):
            target = name.removeprefix("imm_scale.")
            same_room = target.split(".")[0] == room
            assert _layer(target) < here or same_room, f"{module} imports {target}, which comes after or beside it"


@pytest.mark.parametrize("library", DOORS)
def test_a_library_is_imported_behind_its_door_only(library):
    sources = [*_sources(), *(ROOT / "data_tools").rglob("*.py")]
    users = {
        str(path.relative_to(ROOT))
        for path in sources
        if any(name == library or name.startswith(f"{library}.") for name in _imports(path))
    }
    assert all(any(user.startswith(door) for door in DOORS[library]) for user in users), users


def test_the_layers_are_all_there():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in _sources()} - {"__init__"}
    assert {room.split(".")[0] for layer in LAYERS for room in layer} == rooms
