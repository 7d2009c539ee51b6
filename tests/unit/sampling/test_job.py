"""The job of `imm-scale sample`: the same files after kills, on any ranks, in every format, at any URL."""

import io
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from imm_scale import storage
from imm_scale.checkpoint.format import committed_steps
from imm_scale.cli import main
from imm_scale.parallel import world
from tests import ranks

SOAK = int(os.environ.get("IMM_SOAK", "1"))
FORMATS = ("--format", "grid,folder,npz,webdataset", "--latents")


def _argv(source: str, out: Path | str, num: int, *more: str) -> list[str]:
    return ["sample", source, "--steps", "1", "--num", str(num), "--out", str(out), *more]


def _outputs(folder: Path) -> dict[str, bytes]:
    """Every file but the record of the whole, which tells times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path not in folder.glob("steps-*.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _parts(folder: Path) -> int:
    return len(list(folder.glob("*.shards/*.json")))


@pytest.fixture(scope="module")
def undisturbed(trained: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert ranks.run(ranks.command, 1, *_argv(trained, out, 300, *FORMATS, "--batch-size", "64")) == [0]
    return out


def test_every_format_holds_the_same_samples(undisturbed):
    arrays = np.load(undisturbed / "steps-1.npz")
    images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (300, 8, 8, 1)
    assert labels.tolist() == [i % 10 for i in range(300)], "balanced classes"
    assert json.loads(str(arrays["settings"]))["num"] == 300
    names = sorted(path.name for path in (undisturbed / "steps-1").glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(300)]
    listed = json.loads((undisturbed / "steps-1" / "dataset.json").read_text())["labels"]
    assert listed == [[name, i % 10] for i, name in enumerate(names)]
    for i in (0, 77, 299):
        assert np.array_equal(np.asarray(Image.open(undisturbed / "steps-1" / names[i])), images[i, :, :, 0])
    # Stock webdataset reads the shards.
    shards = [str(path) for path in sorted((undisturbed / "steps-1.shards").glob("*.tar"))]
    assert len(shards) == 5
    samples = list(wds.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}" for i in range(300)]
    for i in (3, 299):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(samples[i]["png"]))), images[i, :, :, 0])
        assert int(samples[i]["cls"]) == i % 10
        assert np.array_equal(np.load(io.BytesIO(samples[i]["latent.npy"])), arrays["latents"][i])
    # The decoded latents are the images: pixels, undone by hand.
    codec = json.loads((undisturbed / "steps-1.json").read_text())["settings"]["space"]["codec"]
    values = (arrays["latents"] / 0.5 * codec["std"][0] + codec["mean"][0] + 1.0) * 127.5
    assert np.abs(np.clip(values, 0, 255)[:, 0] - images[..., 0]).max() <= 0.5 + 1e-3


def test_the_record_says_how_to_get_it_again(undisturbed, trained):
    record = json.loads((undisturbed / "steps-1.json").read_text())
    assert record["source"] == trained
    assert record["function_evaluations"] == 1
    assert record["settings"]["seed"] == 0
    assert record["samples_drawn"] == 300
    assert len(record["settings"]["weights"]) == 64


@pytest.mark.parametrize(("size", "batch_size"), [(2, 64), (3, 64)])
def test_other_ranks_write_the_same_bytes(undisturbed, trained, tmp_path, size, batch_size):
    argv = _argv(trained, tmp_path / "out", 300, *FORMATS, "--batch-size", str(batch_size))
    assert ranks.run(ranks.command, size, *argv) == [0] * size
    assert _outputs(tmp_path / "out") == _outputs(undisturbed)


def test_other_batch_sizes_write_the_same_samples(undisturbed, trained, tmp_path):
    argv = _argv(trained, tmp_path / "out", 300, *FORMATS, "--batch-size", "130")
    assert ranks.run(ranks.command, 2, *argv) == [0, 0]
    ours, theirs = _outputs(tmp_path / "out"), _outputs(undisturbed)
    alike = [name for name in theirs if ".shards" not in name]
    assert len(alike) == 300 + 3
    assert all(ours[name] == theirs[name] for name in alike)
    assert len(list((tmp_path / "out" / "steps-1.shards").glob("*.tar"))) == 2, "130 is rounded up to 192"


def test_many_kills_end_in_the_same_bytes(trained, tmp_path):
    """2 ranks, killed 3 times (10 times of 5,000 samples in the soak), each time after some parts more."""
    num, kills = (5000, 10) if SOAK > 1 else (1000, 3)
    argv = [*_argv(trained, tmp_path / "out", num, *FORMATS), "--batch-size", "64", "--steps", "8"]
    killed = 0
    while killed < kills:
        before = _parts(tmp_path / "out")
        started = ranks.start(ranks.command, 2, *argv)
        while _parts(tmp_path / "out") <= before and all(process.is_alive() for process, _ in started):
            time.sleep(0.002)
        for process, _ in started:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        after = _parts(tmp_path / "out")
        assert before < after < -(-num // 64), "each life finished something, none finished all"
        killed += 1
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.shards/*.json")]
    intact = sum(record["stop"] - record["start"] for record in records) - 64
    damaged = sorted((tmp_path / "out" / "steps-8.shards").glob("*.json"))[0].with_suffix(".tar")
    damaged.write_bytes(damaged.read_bytes()[:-700])
    (code, output), _ = ranks.run(ranks.command_and_output, 2, *argv)
    assert code == 0, output
    assert f"{num - intact} samples in" in output, output
    assert f"{intact} were there already" in output
    alone = ranks.run(ranks.command, 1, *[str(tmp_path / "alone") if w == str(tmp_path / "out") else w for w in argv])
    assert alone == [0]
    assert _outputs(tmp_path / "out").keys() == _outputs(tmp_path / "alone").keys()
    assert _outputs(tmp_path / "out") == _outputs(tmp_path / "alone")
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_is_finished_is_not_drawn_again(trained, tmp_path):
    argv = _argv(trained, tmp_path, 100, "--guidance", "1,2", "--format", "npz")
    assert ranks.run(ranks.command, 1, *argv) == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"steps-1{guidance}.{ending}" for guidance in ("-guidance-2", "") for ending in ("json", "npz")
    ]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    code, output = ranks.run(ranks.command_and_output, 1, *argv)[0]
    assert code == 0
    assert output.count("is there already") == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_given_class_counts(trained, tmp_path):
    argv = ["sample", trained, "--steps", "1", "--labels", "3:70,0-1:2", "--format", "npz", "--out", str(tmp_path)]
    assert ranks.run(ranks.command, 2, *argv) == [0, 0]
    assert np.load(tmp_path / "steps-1.npz")["arr_1"].tolist() == [3] * 70 + [0, 0, 1, 1]


def test_a_checkpoint_an_export_and_the_run_draw_the_same(trained, tmp_path):
    step = committed_steps(trained)[-1]
    checkpoint, file = f"{trained}/checkpoints/step-{step:08d}", str(tmp_path / "w.safetensors")
    assert ranks.run(ranks.command, 1, "export", trained, "--out", file) == [0]
    drawn = []
    for i, source in enumerate((trained, checkpoint, file)):
        assert ranks.run(ranks.command, 1, *_argv(source, tmp_path / str(i), 20, "--format", "folder")) == [0]
        drawn.append(_outputs(tmp_path / str(i) / "steps-1"))
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(drawn[0]) == 21


@pytest.fixture
def here() -> Iterator[None]:
    """For commands run in this process."""
    yield
    world.shutdown()


@pytest.mark.usefixtures("here")
def test_samples_of_another_seed_average_or_label_list_never_overwrite_a_set(trained, tmp_path, capsys):
    """Each has a name of its own, finds it again, and draws what it draws into an empty folder."""
    out = tmp_path / "out"
    assert main(_argv(trained, out, 12, *FORMATS)) == 0
    before = _outputs(out)
    for name, more in (
        ("steps-1-seed-5", ["--seed", "5"]),
        ("steps-1-raw-weights", ["--ema", "0"]),
        ("steps-1-labels-3_1-2", ["--labels", "3,1-2"]),
        ("steps-1-num-5", ["--num", "5"]),
    ):
        assert main([*_argv(trained, out, 12, *FORMATS), *more]) == 0
        assert f"steps-1 holds other samples: these go to {name}" in capsys.readouterr().out
        assert main([*_argv(trained, tmp_path / name, 12, *FORMATS), *more]) == 0
        ours = _outputs(out)
        assert {key: ours[key] for key in before} == before
        alone = {key.replace(name, "steps-1"): data for key, data in ours.items() if name in key}
        assert alone == _outputs(tmp_path / name)
        assert main([*_argv(trained, out, 12, *FORMATS), *more]) == 0
        assert _outputs(out) == ours


@pytest.mark.usefixtures("here")
def test_any_url(trained, undisturbed):
    assert main(_argv(trained, "memory://samples", 300, *FORMATS, "--batch-size", "64")) == 0
    for name, data in _outputs(undisturbed).items():
        if not name.endswith("steps-1.json"):
            assert storage.read_bytes(f"memory://samples/{name}") == data


@pytest.mark.parametrize(
    ("argv", "phrases"),
    [
        (["--format", "gif"], ["gif", "webdataset"]),
        (["--guidance", "a,b"], ["a,b"]),
        (["--labels", "3:x"], ["3:x", "count"]),
        (["--labels", "3:4,5"], ["counts"]),
        (["--labels", "3:4", "--num", "9"], ["--num"]),
    ],
)
@pytest.mark.usefixtures("here")
def test_mistakes(argv, phrases, trained, tmp_path, capsys):
    assert main(["sample", trained, "--out", str(tmp_path), *argv]) == 2
    message = capsys.readouterr().err
    assert all(phrase in message for phrase in phrases), message


@pytest.mark.usefixtures("here")
def test_weights_that_diverged_name_the_sample(trained, tmp_path, capsys):
    from imm_scale.checkpoint import export

    spec, tensors = export.read(trained)
    tensors["final_layer.linear.bias"] = torch.full_like(tensors["final_layer.linear.bias"], torch.nan)
    export.write(spec, tensors, str(tmp_path / "nan.safetensors"))
    assert main(_argv(str(tmp_path / "nan.safetensors"), tmp_path, 10)) == 2
    assert "sample 0 (class 0, seed 0, 1 steps) is not finite" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_no_committed_checkpoint(trained, tmp_path, capsys):
    run_dir = tmp_path / "empty"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(Path(trained, "config.yaml").read_text())
    for command in ("sample", "evaluate"):
        assert main([command, str(run_dir)]) == 2
        assert "no committed checkpoint" in capsys.readouterr().err
