"""Links, rights and odd files in a folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools import sources
from imm_scale.errors import UserError
from tests.unit.data_tools.sources import trees

PNG = trees.png()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may look into, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for inside in path.rglob("*"):
        if inside.is_dir() and not inside.is_symlink():
            inside.chmod(0o755)
    shutil.rmtree(path)


def _find(folder: Path) -> sources.Source:
    return sources.find(sources.locate([str(folder)]), None, "image", "label")


def test_links_are_followed_once_and_loops_named(folder: Path) -> None:
    trees.as_folder(folder / "set", {b"a/1.png": PNG, b"b/1.png": PNG})
    trees.as_folder(folder / "elsewhere", {b"2.png": PNG, b"deep/3.png": PNG})
    (folder / "set/c").symlink_to(folder / "elsewhere")  # a class that lies somewhere else
    (folder / "set/b/up").symlink_to("..")  # a loop
    (folder / "set/0").symlink_to("b")  # another name for a class that is there
    (folder / "elsewhere/deep/again").symlink_to(folder / "elsewhere")
    (folder / "set/a/linked.png").symlink_to("1.png")
    (folder / "set/a/gone.png").symlink_to("nowhere.png")
    (folder / "set/a/itself.png").symlink_to("itself.png")
    source = _find(folder / "set")
    root = f"{folder}/set"
    assert source.class_names == ["a", "b", "c"]
    assert sorted(source.names) == sorted(
        f"{root}/{name}"
        for name in ("a/1.png", "a/gone.png", "a/itself.png", "a/linked.png", "b/1.png", "c/2.png", "c/deep/3.png")
    )
    count, example = source.left_out.reasons["links to folders that are packed already"]
    assert count == 3 and example == f"{root}/0 (to {root}/b)"


def test_a_link_above_the_source_does_not_lead_into_it_again(folder: Path) -> None:
    trees.as_folder(folder / "set/train", {b"a/1.png": PNG, b"b/1.png": PNG})
    trees.as_folder(folder / "set", {b"more/2.png": PNG})
    (folder / "set/train/b/up").symlink_to("../../..")
    source = _find(folder / "set/train")
    root = f"{folder}/set/train"
    assert sorted(source.names) == [f"{root}/a/1.png", f"{root}/b/1.png", f"{root}/b/up/set/more/2.png"]
    assert source.left_out.reasons["links to folders that are packed already"] == (
        1,
        f"{root}/b/up/set/train (to {root})",
    )


def test_a_class_on_a_disk_that_is_not_there_is_not_passed_over(folder: Path) -> None:
    """Without it every later class would have another number."""
    trees.as_folder(folder / "set", {b"ant/1.png": PNG, b"cat/1.png": PNG, b"cat/README.md": b""})
    (folder / "set/bee").symlink_to("/mnt/unplugged/bee")
    with pytest.raises(UserError, match=r"set/bee, beside .* leads nowhere \(to /mnt/unplugged/bee\)"):
        _find(folder / "set")
    (folder / "set/bee").rename(folder / "set/cat/notes")  # no class, down there
    (folder / "set/list.txt").symlink_to("/gone/list.txt")
    (folder / "set/.lock").symlink_to("somebody@host:7")
    source = _find(folder / "set")
    assert source.class_names == ["ant", "cat"]
    assert source.left_out.reasons["links that lead nowhere"][0] == 2


def test_pipes_do_not_hold_the_job_up(folder: Path) -> None:
    trees.as_folder(folder / "set", {b"a/1.png": PNG, b"b/1.png": PNG})
    os.mkfifo(folder / "set/a/2.png")
    source = _find(folder / "set")
    assert len(source.images) == 2 and "pipes, sockets and devices" in source.left_out.reasons


def test_a_folder_without_rights_stops_the_job_by_name(folder: Path) -> None:
    trees.as_folder(folder / "set", {b"a/1.png": PNG, b"b/deep/1.png": PNG})
    (folder / "set/b/deep").chmod(0)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)  # root may look everywhere
    try:
        with pytest.raises(UserError, match=r"b/deep: permission denied"):
            _find(folder / "set")
    finally:
        os.seteuid(before)
