"""The text sbatch gets, against golden files, and as bash and sbatch read it."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imm_scale.errors import UserError
from launchers import cluster
from launchers.script import Job, job_name, quote, script

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = "a b;'\"$(touch pwned)`touch pwned`\n#SBATCH --nodes=9\r\n\\ é \t*"

JOBS = {
    "train_default": (
        "default",
        Job("train", (("configs/my_run.yaml", "optimizer.lr=5e-4"),), "my_run", "/shared/my_run/logs/%j.out", "64"),
    ),
    "train_elastic_pyxis": (
        "pyxis",
        Job(
            kind="train",
            tasks=(("configs/my_run.yaml", f"run.name={HOSTILE}"),),
            name="spaces and $(signs)",
            output="/shared/a b/$(c) 'd' 50%%/%j.out",
            nodes="4-8",
            gpus_per_node=4,
            cpus_per_task=6,
            time="2-00:00:00",
            partition="gpu",
            account="lab-42",
            qos="high",
            dependency="afterok:17",
            exclude="node[3,7]",
            grace_seconds=600,
            max_restarts=3,
        ),
    ),
    "sweep_array_lab": (
        "lab",
        Job(
            "train", (("c.yaml", "seed=0"), ("c.yaml", "seed=1")), "sweep", "/runs/%A_%a.out", "2", array="0-1%1"
        ),
    ),
    "encode_apptainer_torchrun": (
        "apptainer",
        Job(
            kind="encode",
            tasks=(("--images", "s3://b/images", "--out", "s3://b/latents", "--codec", "pixels"),),
            name="encode",
            output="/shared/logs/encode-%A_%a.out",
            array="0-63%16",
            launch="torchrun",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_the_text_is_the_golden_one(name):
    site, job = JOBS[name]
    text = script(job, cluster.load(site), "/shared/imm scale")
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("IMM_GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()


def test_installed_code_is_named_and_not_the_folder_the_job_runs_in():
    """A checkout is entered; an installed launchers/ lies elsewhere, and its scripts find each other there."""
    job = Job("train", (("demo",),), "demo", "/shared/%j.out")
    lines = script(job, cluster.load("lab"), "/work dir", "/env/site packages").splitlines()
    assert "cd '/work dir' || exit 1" in lines
    assert lines[-1:] == ["source '/env/site packages/launchers/train.sbatch'"]
    assert "IMM_CODE='/env/site packages'" in lines
    assert not any(line.startswith("IMM_CODE=") for line in script(job, cluster.load("lab"), "/work dir").splitlines())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=4))
def test_bash_reads_back_every_word(args):
    line = " ".join(quote(arg) for arg in args)
    assert "\n" not in line and "\r" not in line
    completed = subprocess.run(
        ["bash", "-c", f"set -- {line}\nprintf '%s\\0' \"$@\""],
        capture_output=True, env={"LC_ALL": "C.UTF-8"}, check=True,
    )  # fmt: skip
    assert completed.stdout.decode().split("\0")[:-1] == (args or [""])


def test_no_line_of_a_value_becomes_an_option():
    site, job = JOBS["train_elastic_pyxis"]
    options = [line for line in script(job, cluster.load(site), "/c").splitlines() if line.startswith("#SBATCH")]
    assert options.count("#SBATCH --nodes=4-8") == 1
    assert not any("nodes=9" in option for option in options)


@pytest.mark.parametrize("output", ["/a\nb/%j.out", "/a\\b/%j.out"])
def test_an_option_that_no_header_can_hold_is_refused(output):
    with pytest.raises(UserError, match="rename it"):
        script(Job("train", (("c.yaml",),), "n", output), cluster.load("lab"), "/c")


def test_job_names_are_plain():
    assert re.fullmatch(r"[\w.-]+", job_name(HOSTILE))
    assert job_name("é") == "imm"
