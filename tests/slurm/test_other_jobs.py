"""Encoding and evaluation on a real SLURM."""

import json
import shutil
from pathlib import Path

from imm_scale.data.manifest import Manifest
from launchers import submit
from tests.slurm.cluster import ranks_of, until
from tests.slurm.test_training import soak

TASKS = 2


def _job(printed: str) -> int:
    return int(printed.removeprefix("job ").split(":")[0])


@soak
def test_a_killed_task_is_done_again(cluster, digits, tmp_path, capsys):
    images, out = Path(digits).parents[1] / "images", tmp_path / "latents; $(touch pwned)"
    args = ["--images", str(images), "--out", str(out), "--codec", "pixels"]
    array = ["--array", f"0-{TASKS - 1}", "--gpus-per-node", "1"]
    assert submit.main(["encode", "--cluster", "lab", *array, "--", *args]) == 0
    job = _job(capsys.readouterr().out)

    def victims():
        return [process for process in ranks_of(job, "data_tools.encode") if process.task == "1"]

    until("task 1 runs", victims)
    victims()[0].kill()
    cluster.wait(job)
    assert "back to the queue" in Path(f"logs/encode-{job}_1.out").read_text()
    assert not list(tmp_path.rglob("pwned"))
    here, there = (json.loads(Path(path).read_text()) for path in (digits, out / "manifest.json"))
    assert there["shards"] == here["shards"]
    assert Manifest.load(str(out / "manifest.json")).num_samples == 1797


@soak
def test_an_evaluation_by_two_ranks(cluster, trained, tmp_path, capsys):
    run_dir = tmp_path / "run; $(touch pwned)"
    shutil.copytree(trained, run_dir)
    args = ["--steps", "1", "--repeats", "1", "--num", "64"]
    assert submit.main(["evaluate", str(run_dir), "--cluster", "lab", "--", *args]) == 0
    cluster.wait(_job(capsys.readouterr().out))
    (evaluation,) = (run_dir / "evaluations").iterdir()
    (result,) = json.loads(evaluation.read_text())["results"]
    assert (result["steps"], result["num"]) == (1, 64)
    assert not list(tmp_path.rglob("pwned"))
