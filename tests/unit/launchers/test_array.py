"""A sweep as an array of jobs: what is queued, and what the queue's answer means for each cell."""

import json
import stat
from pathlib import Path

import pytest
import yaml

from imm_scale.errors import UserError
from imm_scale.sweeps import definition, results
from launchers import array
from launchers.sweep import activity, main

_SBATCH = """#!/bin/sh
echo called >> {folder}/calls
cat > {folder}/script
echo $((6 + $(wc -l < {folder}/calls)))
"""
_SQUEUE = "#!/bin/sh\ncat {folder}/queue\n"


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder with an sbatch that notes what it gets (jobs 7, 8, ...) and a squeue that prints the file `queue`."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "queue").write_text("")
    for name, text in (("sbatch", _SBATCH), ("squeue", _SQUEUE), ("sinfo", "#!/bin/sh\necho 'debug|4|gpu:8'\n")):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


@pytest.fixture
def path(tmp_path) -> str:
    base = {"model": {"width": 16, "depth": 2, "heads": 2}, "data": {"latent_shape": [1, 8, 8], "num_classes": 10}}
    base["train"] = {"global_batch_size": 64, "micro_batch_size": 64, "max_steps": 5}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    document = {"configs": ["base.yaml"], "folder": str(tmp_path / "out; $(id) 'é"), "seeds": [0, 1, 2]}
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(document))
    return str(tmp_path / "three.yaml")


@pytest.fixture
def site(tmp_path) -> list[str]:
    (tmp_path / "site.yaml").write_text("gpus_per_node: 2\nlocal_paths: []\n")
    return ["--cluster", str(tmp_path / "site.yaml"), "--at-once", "2"]


def test_an_array_has_a_task_per_cell_and_a_bound(path, site, slurm, capsys):
    assert main(["submit", path, *site, "--time", "1:00:00", "--nodes", "2"]) == 0
    assert "job 7: 3 cells of 2 nodes x 2 ranks, 2 at a time" in capsys.readouterr().out
    script = (slurm / "script").read_text()
    assert "#SBATCH --array=0-2%2" in script
    assert "#SBATCH --time=1:00:00" in script
    assert script.endswith("source launchers/cell.sbatch\n")
    sweep = definition.load(path)
    (launch,) = (Path(sweep.folder) / "launches").iterdir()
    assert json.loads((launch / "cells.json").read_text()) == [cell.name for cell in sweep.cells]
    assert (launch / "code.json").exists()


def test_what_the_queue_has_is_not_queued_again(path, site, slurm, capsys):
    assert main(["submit", path, *site]) == 0
    (slurm / "queue").write_text("7_0|RUNNING|None|n1|\n7_1|PENDING|Priority||\n7_2|FAILED|NonZeroExitCode|n1|\n")
    sweep = definition.load(definition.load(path).folder)
    assert activity(sweep) == {"seed0": "running", "seed1": "queued"}
    results.write_state(sweep.folder, "seed2", "failed", "OSError: disk full", code="c0ffee")
    assert main(["submit", path, *site]) == 0
    assert "0 of 3 cells to run (1 running, 1 queued, 1 failed)" in capsys.readouterr().err
    assert (slurm / "calls").read_text().count("called") == 1
    assert main(["retry", path, *site]) == 0
    assert "#SBATCH --array=0-0%2" in (slurm / "script").read_text()
    assert main(["status", path]) == 0
    printed = capsys.readouterr().out
    assert "queued 1  running 1" in printed


def test_a_folder_that_nodes_do_not_share_is_refused(path, slurm, tmp_path, capsys):
    (tmp_path / "site.yaml").write_text(f"local_paths: [{tmp_path}]\n")
    assert main(["submit", path, "--cluster", str(tmp_path / "site.yaml")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (slurm / "calls").exists()


def test_a_bound_of_nothing_is_refused(path):
    sweep = definition.load(path)
    with pytest.raises(UserError, match="--at-once 0"):
        array.job_of(sweep, sweep.cells, 0)
