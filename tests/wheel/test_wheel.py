"""The wheel in an environment of its own: every command works in an empty folder, away from any checkout."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
_SOURCES = ("imm_scale", "data_tools", "launchers", "configs", "pyproject.toml", "README.md", "LICENSE")
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")

# A SLURM of this machine alone, where there may be none or one without a controller. srun's options come first and all
# begin with two dashes.
_SLURM = {
    "srun": """while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_NODEID=0 exec "$@\"""",
    "scontrol": "echo node1",
    "sinfo": "echo 'debug|1|gpu:8'",
}


def _clean() -> dict[str, str]:
    """The environment's variables without those that lead to the checkout, or to a site of the user's."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "IMM_CLUSTER")}


def _build(folder: Path) -> Path:
    """The wheel of this tree, built from a copy, for setuptools leaves build/ behind."""
    tree = folder / "tree"
    tree.mkdir()
    for name in _SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    is_new = int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    alone = ["--no-build-isolation"] if is_new else []
    subprocess.run([*_PIP, "wheel", str(tree), "--no-deps", *alone, "-w", str(folder)], check=True, env=_clean())
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it. Of this one's packages it sees what lies in site-packages: a folder
    that a .pth names does not have its own .pth files read, and with them goes the link to the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    site = next((folder / "env" / "lib").glob("python3*")) / "site-packages"
    python = str(folder / "env" / "bin" / "python")
    subprocess.run(
        [*_PIP, "--python", python, "install", "--no-deps", "--no-index", str(_build(folder))], check=True, env=_clean()
    )
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")  # last: pip would find the package installed
    for name, script in _SLURM.items():
        (folder / "env" / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / "env" / "bin" / name).chmod(0o755)
    return folder / "env"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, which the tests of this module fill in turn."""
    return tmp_path_factory.mktemp("work")


def _run(environment: Path, work: Path, *argv: str, code: int = 0) -> str:
    """What a program of the environment prints, run in the folder."""
    env = {**_clean(), "PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        argv, cwd=work, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def test_the_checkout_cannot_be_imported(environment: Path, work: Path) -> None:
    where = _run(environment, work, "python", "-c", "import imm_scale, launchers; print(imm_scale.__file__)")
    assert Path(where.strip()).is_relative_to(environment)
    assert "No module named 'experiments'" in _run(environment, work, "python", "-c", "import experiments", code=1)


def test_recipes_sites_and_scripts_are_those_of_the_checkout(environment: Path) -> None:
    site = next((environment / "lib").glob("python3*")) / "site-packages"
    for ours, theirs, patterns in (
        (ROOT / "configs", site / "imm_scale" / "configs", ("**/*.yaml",)),
        (ROOT / "launchers", site / "launchers", ("*.sbatch", "*.sh")),
    ):
        files = {path.relative_to(ours) for pattern in patterns for path in ours.glob(pattern)}
        assert files and {path for path in files if (ours / path).read_bytes() == (theirs / path).read_bytes()} == files


def test_the_demo_from_images_to_a_trained_net(environment: Path, work: Path) -> None:
    command = str(environment / "bin" / "imm-scale")
    assert "pack" in _run(environment, work, command, "--help")
    _run(environment, work, command, "pack", "--source", "digits", "--out", "data/digits/images")
    folders = ("--images", "data/digits/images", "--out", "data/digits/latents")
    _run(environment, work, command, "encode", *folders, "--codec", "pixels")
    _run(environment, work, command, "train", "demo", *TINY, "train.max_steps=2")
    assert json.loads((work / "runs/demo/imm/status.json").read_text())["state"] == "completed"


def test_plans(environment: Path, work: Path) -> None:
    command = str(environment / "bin" / "imm-scale")
    shape = ("data.latent_shape=[4,32,32]", "data.num_classes=1000")
    page = _run(environment, work, command, "plan", "imagenet256_dit_xl2", *shape, "--gpu", "h100-80gb")
    assert "h100-80gb" in page
    table = _run(environment, work, command, "sweep", "plan", "digits_scaling_ci")
    assert "4 cells" in table and "folder sweeps/digits_scaling_ci" in table
    message = _run(environment, work, command, "train", "imagenet", code=2)
    assert "imagenet256_dit_xl2" in message and "digits_scaling" not in message


def test_a_submitted_job_trains_with_the_installed_code(environment: Path, work: Path) -> None:
    """The text for sbatch as bash runs it, with an srun that starts one rank here."""
    command = str(environment / "bin" / "imm-scale")
    (work / "site.yaml").write_text("gpus_per_node: 0\nranks_per_node: 1\nlocal_paths: []\n")
    args = ("demo", *TINY, "train.max_steps=3", "run.name=job")
    text = _run(environment, work, command, "submit", *args, "--cluster", "site.yaml", "--dry-run")
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=job\n")
    assert f"\ncd {work} || exit 1\n" in text
    (work / "job.sbatch").write_text(text)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}
    settings = [f"{key}={value}" for key, value in slurm.items()]
    printed = _run(environment, work, "env", *settings, "bash", "job.sbatch")
    assert json.loads((work / "runs/job/status.json").read_text())["state"] == "completed", printed
    code = json.loads((work / "runs/job/launcher.json").read_text())
    assert re.search(r'"0\.1\.0\+[0-9a-f]{8}"', json.dumps(code)), "the launcher notes the release that trained"


def test_encoding_on_a_site_that_comes_along(environment: Path, work: Path) -> None:
    command = str(environment / "bin" / "imm-scale")
    _run(environment, work, command, "pack", "--source", "digits", "--out", "a b")
    encode = ("--images", "a b", "--out", "latents", "--codec", "pixels")
    text = _run(environment, work, command, "submit", "encode", "--cluster", "pyxis", "--dry-run", "--", *encode)
    assert "set -- --images 'a b' --out latents --codec pixels" in text and "--container-image" in text
    source = next(line for line in text.splitlines() if line.startswith("source ") and line.endswith(".sbatch"))
    assert Path(source.removeprefix("source ")).is_relative_to(environment)
