"""What a machine without a network lacks. (A real run needs the network: docs/clusters.md.)"""

import subprocess
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

from imm_scale.errors import UserError
from launchers import wheelhouse

PYPROJECT = """
[project]
name = "x"
dependencies = ["torch>=2.11", "omegaconf>=2.4"]
[project.optional-dependencies]
vae = ["diffusers>=0.34"]
"""
PINS = {"torch": "2.13.0", "omegaconf": "2.4.0", "huggingface-hub": "2.4.0"}


def test_what_the_project_asks_for():
    assert wheelhouse.required([], PYPROJECT) == ["torch>=2.11", "omegaconf>=2.4"]
    assert wheelhouse.required(["vae"], PYPROJECT)[-1] == "diffusers>=0.34"
    with pytest.raises(UserError, match="'vea' does not exist: choose from vae"):
        wheelhouse.required(["vea"], PYPROJECT)


def test_versions_are_the_tested_ones_unless_said():
    assert wheelhouse.pinned("# set\nTorch==2.13.0\nhuggingface_hub==2.4.0  # why\n\n") == {
        "torch": "2.13.0", "huggingface-hub": "2.4.0",
    }  # fmt: skip
    assert wheelhouse.had(["torch==2.11.0", "huggingface_hub", "timm"], PINS) == {
        "torch": "2.11.0", "huggingface-hub": "2.4.0", "timm": "0",
    }  # fmt: skip


def test_pip_takes_a_stand_in_for_the_package_and_finds_that_it_needs_nothing(tmp_path):
    path = wheelhouse.stand_in(tmp_path, "huggingface-hub", "2.4.0")
    name, version, _, _ = parse_wheel_filename(path.name)
    assert (name, str(version)) == ("huggingface-hub", "2.4.0")
    assert list(wheelhouse.needs(path, "3.12")) == []
    text = wheelhouse.constraints_with(PINS, {"huggingface-hub": path})
    lines = [Requirement(line) for line in text.splitlines()]
    assert [line.name for line in lines] == ["torch", "omegaconf", "huggingface-hub"]
    assert lines[-1].url == path.as_uri()
    # By the real pip, without a network: it takes the stand-in, since the folder is all it may look at.
    (tmp_path / "constraints.txt").write_text(f"huggingface-hub @ {path.as_uri()}\n")
    options = ["--no-index", "--only-binary=:all:", "--python-version=3.12", f"--constraint={tmp_path}/constraints.txt"]
    wheelhouse._pip("download", *options, f"--dest={tmp_path}/out", "huggingface_hub>=2")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [path.name]


def _wheel(folder: Path, name: str, *requires: str) -> Path:
    path = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1", *(f"Requires-Dist: {word}" for word in requires)]
        file.writestr(f"{name}-1.dist-info/METADATA", "\n".join(lines) + "\n\nA long description.\n")
    return path


def test_needs_are_judged_for_the_machines_python(tmp_path):
    requirements = ['b>=2; python_version >= "3.12"', 'c; python_version < "3.12"', 'd; extra == "more"', "E_f", "g"]
    wheels = [_wheel(tmp_path, "a", *requirements), _wheel(tmp_path, "g")]
    assert wheelhouse.missing(wheels, [], "3.12") == ["b", "e-f"]
    assert wheelhouse.missing(wheels, ["e-f"], "3.11") == ["c"]


def test_tags_are_of_that_glibc_and_older_ones():
    options = wheelhouse.Target("3.12", {}, 28, "aarch64").options()
    tags = [word.removeprefix("--platform=") for word in options if word.startswith("--platform=")]
    assert tags[0] == "manylinux_2_28_aarch64" and {"manylinux_2_17_aarch64", "manylinux2014_aarch64"} <= set(tags)
    assert all(tag.endswith("_aarch64") and "2_29" not in tag for tag in tags)


def test_a_package_without_a_wheel_is_named(monkeypatch, capsys, tmp_path):
    def refuse(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        message = "ERROR: Could not find a version that satisfies the requirement foo-bar>=1\n"
        return subprocess.CompletedProcess(
            command, 1, "", message + "ERROR: No matching distribution found for foo-bar>=1\n"
        )

    monkeypatch.setattr(wheelhouse.subprocess, "run", refuse)
    assert wheelhouse.main(["--build", "", "--out", str(tmp_path / "out")]) == 2
    assert "foo-bar has no wheel for that Python and platform; name it under BUILD" in capsys.readouterr().err


def test_the_line_that_installs():
    text = wheelhouse.summary([("a-1-py3-none-any.whl", 3 << 20), ("b.whl", 1 << 19)], "wheelhouse", "3.12", ["a", "b"])
    assert "    3.50 MiB  in 2 wheels for Python 3.12" in text
    assert "  python3.12 -m pip install --no-index --find-links wheelhouse a b" in text.splitlines()
