"""`imm-scale submit` on a machine without SLURM: what it refuses, and what it would submit."""

import dataclasses
from pathlib import Path

import pytest

from imm_scale import cli
from imm_scale.errors import UserError
from launchers import checks, cluster, slurm, submit
from launchers.script import Job

ROOT = Path(__file__).parents[3]
JOB = Job("train", (("c.yaml",),), "n", "/logs/%j.out", "2")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(slurm, "available", lambda: False)


def _refused(capsys, phrases, *argv):
    assert submit.main(argv) == 2
    message = capsys.readouterr().err
    for phrase in phrases:
        assert phrase in message


@pytest.mark.parametrize(
    ("flags", "phrases"),
    [
        (["--time", "tomorrow"], ["tomorrow", "12:00:00"]),
        (["--time", "1:99:00"], ["1:99:00"]),
        (["--time", "5", "--grace-seconds", "300"], ["--time 5", "--grace-seconds 300"]),
        (["--nodes", "0"], ["--nodes 0", "4-8"]),
        (["--nodes", "8-4"], ["8-4"]),
        (["--nodes", "many"], ["many"]),
        (["--gpus-per-node", "-1"], ["--gpus-per-node -1", "at least 0"]),
        (["--ranks-per-node", "0"], ["--ranks-per-node 0", "at least 1"]),
        (["--ranks-per-node", "-3"], ["--ranks-per-node -3"]),
        (["--cpus-per-task", "0"], ["--cpus-per-task 0"]),
        (["--grace-seconds", "-5"], ["--grace-seconds -5"]),
        (["--max-restarts", "-1"], ["--max-restarts -1"]),
        (["--dependency", "afterwards:12"], ["afterwards:12", "afterok:123"]),
        (["--array", "0-3"], ["0-3", "imm-scale sweep"]),
        (["--gpus-per-node", "16"], ["--gpus-per-node 16", "has 2", "--nodes"]),
        (["--cluster", "nowhere"], ["nowhere", "lab", "pyxis"]),
        (["--nodes", "40"], ["80 ranks"]),
        (["trane.max_steps=5"], ["trane.max_steps", "train.max_steps"]),
        (["data.manifest=/nowhere.json"], ["/nowhere.json"]),
        (["loss"], ["'loss'"]),
    ],
)
def test_a_job_that_cannot_run(flags, phrases, tiny, capsys):
    _refused(capsys, phrases, "train", *tiny, "--cluster", "lab", *flags)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("run.dir=RUN model.dropout=0.1 train.max_steps=9", "holds a run with another config"),
        ("train.init_from=RUN model.width=64", "holds another net"),
        ("train.init_from=RUN method.flow_map.second_time=t_minus_s", "its weights mean something else"),
        ("train.init_from=RUN train.init_ema=0.31", "no moving average of decay 0.31"),
    ],
)
def test_a_run_that_could_not_start_from_what_is_there(change, said, tiny, trained, capsys):
    words = change.replace("RUN", trained).split()
    _refused(capsys, [said], "train", *tiny, *words, "--cluster", "lab", "--dry-run")
    assert cli.main(["train", *tiny, *words, "--dry-run"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["status", "RUN"], ["cancel", "RUN"], ["logs", "RUN"]])
def test_a_run_that_was_never_submitted(argv, trained, capsys):
    _refused(capsys, [trained, "not submitted"], *(trained if word == "RUN" else word for word in argv))


@pytest.mark.parametrize("text", ["afterok:1", "after:1+5:2,afterany:3_4", "afternotok:1?singleton", "aftercorr:7"])
def test_dependencies_as_sbatch_takes_them(text):
    checks.check(dataclasses.replace(JOB, dependency=text), cluster.load("lab"), ask=False)


@pytest.mark.parametrize("array", ["5-1", "0-3,9-7%2"])
def test_a_range_of_tasks_that_is_empty(array):
    with pytest.raises(UserError, match=f"--array {array}"):
        checks.check(dataclasses.replace(JOB, array=array), cluster.load("lab"), ask=False)


@pytest.mark.parametrize(
    "text", [b"grace_seconds: 0", b"gpus_per_node: -2", b"ranks_per_node: 0", b"partition: \xff", b"qos: a\nqos: b"]
)
def test_a_site_that_cannot_be(text, tmp_path):
    (tmp_path / "site.yaml").write_bytes(text)
    with pytest.raises(UserError, match=r"must be at least|is no YAML|:2: qos stands here again"):
        checks.check(JOB, cluster.load(f"{tmp_path}/site.yaml"), ask=False)


def test_options_of_the_program_are_sent_behind_two_dashes(capsys):
    with pytest.raises(SystemExit, match="2"):
        submit.main(["evaluate", "runs/my_run", "--steps", "4"])
    message = capsys.readouterr().err
    assert "--steps 4" in message and "behind --, as in evaluate RUN -- --steps 4" in message


def test_evaluate_wants_a_run(capsys):
    _refused(capsys, ["runs/my_run"], "evaluate", "--cluster", "lab")


@pytest.mark.parametrize(
    ("argv", "phrases"),
    [
        (["encode", "--", "--imagez", "x"], ["imm-scale encode: error", "--imag"]),
        (["encode", "--", "--images", "IMAGES", "--out", "o", "--codec", "vea"], ["--codec", "vea", "pixels"]),
        (["encode", "--", "--images", "IMAGES", "--out", "o", "--codec", "vae"], ["--vae PATH"]),
        (["encode", "--", "--images", "IMAGES", "--out", "o", "--codec", "pixels", "--vae", "v"], ["--vae v"]),
        (
            ["encode", "--", "--images", "IMAGES", "--out", "o", "--codec", "pixels", "--batch-size", "0"],
            ["--batch-size"],
        ),
        (
            ["encode", "--", "--images", "IMAGES", "--out", "o", "--codec", "pixels", "--task-index", "3"],
            ["--num-tasks"],
        ),
        (["encode", "--", "--images", "nowhere", "--out", "o", "--codec", "pixels"], ["no pack.json in nowhere"]),
        (["encode", "--", "--images", "IMAGES", "--out", "README.md/o", "--codec", "pixels"], ["README.md", "a file"]),
        (["evaluate", "nowhere"], ["nowhere is not a run folder"]),
        (["evaluate", "RUN", "--", "--stepz", "3"], ["imm-scale evaluate: error", "--stepz"]),
        (["evaluate", "RUN", "--", "--steps", "0"], ["evaluation.steps=[0]", "[1, inf)"]),
        (["evaluate", "RUN", "--", "--steps", "x"], ["evaluation.steps"]),
        (["evaluate", "RUN", "optimizer.lr=1"], ["optimizer.lr does nothing here"]),
        (["evaluate", "RUN", "sampling.sampler=huen"], ["huen"]),
        (["evaluate", "RUN", "--", "--reference", "nowhere.npz"], ["evaluation.reference=nowhere.npz does not exist"]),
        (["evaluate", "RUN", "--", "--search", "guidance=3:1"], ["guidance=3:1"]),
        (["evaluate", "RUN", "--", "--guidance", "nan"], ["guidance_scale=nan"]),
    ],
)
def test_what_a_job_would_refuse_after_hours_is_refused_at_once(argv, phrases, trained, digits, capsys):
    args = [{"RUN": trained, "IMAGES": str(Path(digits).parents[1] / "images")}.get(word, word) for word in argv]
    try:
        code = submit.main([args[0], "--cluster", "lab", "--dry-run", *args[1:]])
    except SystemExit as error:  # argparse
        code = error.code
    message = capsys.readouterr().err
    assert code == 2 and all(phrase in message for phrase in phrases), message


def test_what_another_job_makes_first_need_not_be_there(capsys):
    later = ["--cluster", "lab", "--dry-run", "--dependency", "afterok:1"]
    assert submit.main(["evaluate", *later, "nowhere", "--", "--steps", "1"]) == 0
    assert submit.main(["encode", *later, "--", "--images", "nowhere", "--out", "o", "--codec", "pixels"]) == 0
    assert capsys.readouterr().out.count("#SBATCH --dependency=afterok:1") == 2


def test_weights_to_start_from_are_looked_for(tiny, capsys):
    _refused(capsys, ["train.init_from=/nowhere"], "train", *tiny, "train.init_from=/nowhere", "--cluster", "lab")


def test_it_runs_from_the_checkout_only(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _refused(capsys, [str(ROOT)], "train", *tiny)


def test_a_folder_other_nodes_do_not_see(tiny, capsys, tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text(f"local_paths: [{tmp_path}]\ngpus_per_node: 2\n")
    _refused(capsys, [str(tmp_path), "shared"], "train", *tiny, "--cluster", str(site))


def test_a_dry_run_prints_the_text_and_writes_nothing(tiny, tmp_path, capsys):
    assert submit.main(["train", "--cluster", "lab", "--nodes", "2", *tiny, "--dry-run", "seed=3"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=2" in text
    assert text.rstrip().endswith("source launchers/train.sbatch")
    assert "seed=3" in text
    assert not (tmp_path / "run").exists()


def test_flags_of_the_program_go_after_two_dashes(capsys, digits, tmp_path):
    (tmp_path / "a b").symlink_to(Path(digits).parents[1] / "images")
    args = ["--images", f"{tmp_path}/a b", "--out", "o", "--codec", "pixels"]
    assert submit.main(["encode", "--cluster", "lab", "--array", "0-3%2", "--dry-run", "--", *args]) == 0
    text = capsys.readouterr().out
    assert f"set -- --images '{tmp_path}/a b' --out o --codec pixels" in text
    assert "#SBATCH --array=0-3%2" in text


def test_a_complete_run_is_not_submitted(trained, digits, capsys):
    from tests.conftest import TINY

    overrides = [*TINY, f"data.manifest={digits}", f"run.dir={trained}", "train.max_steps=2"]
    assert submit.main(["train", *overrides, "--cluster", "lab"]) == 0
    assert "nothing to submit" in capsys.readouterr().out


PARTITIONS = [slurm.Partition("gpu", 4, 8), slurm.Partition("small", 64, 1)]


@pytest.mark.parametrize(
    ("changes", "phrases"),
    [
        ({"array": "a-b"}, ["a-b", "0-63%8"]),
        ({"partition": "gpus"}, ["--partition gpus", "gpu, small"]),
        ({"partition": "gpu", "nodes": "5-9"}, ["--nodes 5", "has 4"]),
        ({"partition": "small", "gpus_per_node": 2}, ["--gpus-per-node 2", "at most 1"]),
    ],
)
def test_what_sinfo_contradicts(changes, phrases, monkeypatch):
    monkeypatch.setattr(slurm, "partitions", lambda: PARTITIONS)
    with pytest.raises(UserError) as caught:
        checks.check(dataclasses.replace(JOB, **changes), cluster.Cluster(), ask=True)
    assert all(phrase in str(caught.value) for phrase in phrases)


# As the manual of sbatch has them.
TIMES = {"90": 5400, "90:30": 5430, "12:00:00": 43200, "1:2:3": 3723, "2-1": 176400, "1-0:30": 88200, "1-0:0:1": 86401}


@pytest.mark.parametrize("time", TIMES)
def test_times_slurm_takes(time):
    assert checks.limit_seconds(time) == TIMES[time]
    checks.check(dataclasses.replace(JOB, time=time), cluster.Cluster(), ask=False)


def test_no_time_limit():
    for time in ("UNLIMITED", None):
        checks.check(dataclasses.replace(JOB, time=time), cluster.Cluster(), ask=False)


@pytest.mark.parametrize("array", ["0", "0-63", "0-63%8", "1,3,7%2", "0-30:3", "1-3,7-9%2"])
def test_arrays_slurm_takes(array):
    checks.check(dataclasses.replace(JOB, array=array), cluster.Cluster(), ask=False)


@pytest.mark.parametrize("name", cluster.names())
def test_the_sites_that_come_along_can_be_read(name):
    assert cluster.load(name).launch == "srun"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("gpu_per_node: 8", "gpus_per_node"),
        ("time: 12:00:00", "quotes"),
        ("gpus_per_node: eight", "eight"),
        ("launch: mpirun", "torchrun"),
        ("srun: --mpi=pmix", "srun"),
        ("- a", "mapping"),
        ("a: [", "YAML"),
    ],
)
def test_a_site_file_with_a_mistake(text, word, tmp_path):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(UserError, match=word):
        cluster.load(str(tmp_path / "site.yaml"))


def test_gpus_as_sinfo_writes_them(monkeypatch):
    monkeypatch.setattr(slurm, "_run", lambda command: "gpu|2|gpu:h100:8(S:0-1)\ngpu|2|gpu:4,shard:16\ncpu|3|(null)")
    assert slurm.partitions() == [slurm.Partition("gpu", 4, 8), slurm.Partition("cpu", 3, 0)]
