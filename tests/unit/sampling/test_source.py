"""What `sample` and `evaluate` read of a config, and what they refuse because it would do nothing."""

import pytest

from imm_scale import cli, errors
from imm_scale import config as configs
from imm_scale.evaluation import command
from imm_scale.sampling import draw, job
from imm_scale.sampling.source import Source, config_of


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has a config alone."""
    (tmp_path / "config.yaml").write_text(configs.to_yaml(configs.load([], ["method.label_drop=0.2"]).config))
    return Source(str(tmp_path), str(tmp_path))


def _others(reads: tuple[str, ...]) -> list[str]:
    """One key of each section, and all of those of which only some are read, that are not read."""
    keys = [key for key in configs.flatten(configs.Config()) if key not in reads]
    return [key for key in keys if not key.startswith(tuple(read for read in reads if read.endswith(".")))]


@pytest.mark.parametrize("reads", [job.READS, command.READS], ids=["sample", "evaluate"])
def test_keys_that_a_command_does_not_read_are_refused(run, reads):
    values = configs.flatten(configs.Config())
    others = _others(reads)
    assert {"optimizer.lr", "run.name", "train.max_steps", "model.width", "method.k", "ema.decays"} <= set(others)
    seen = set()
    for key in others:
        section = key.partition(".")[0]
        if section in seen or values[key] is None:
            continue
        seen.add(section)
        with pytest.raises(errors.UserError, match=f"{key} does nothing here"):
            config_of(run, [f"{key}={str(values[key]).lower()}"], reads)
    assert config_of(run, ["sampling.seed=3"], reads).sampling.seed == 3
    assert config_of(run, [], reads).method.label_drop == 0.2


def test_the_key_that_was_meant_is_named(run):
    with pytest.raises(errors.UserError, match=r"sampling\.steps does nothing here.*did you mean evaluation\.steps\?"):
        config_of(run, ["sampling.steps=[3]"], command.READS)
    with pytest.raises(errors.UserError, match=r"evaluation\.num does nothing here.*did you mean sampling\.num\?"):
        config_of(run, ["evaluation.num=3"], job.READS)
    with pytest.raises(errors.UserError, match=r"unknown key 'sampling\.stepz'"):
        config_of(run, ["sampling.stepz=[3]"], job.READS)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sample", "RUN", "optimizer.lr=1"], "optimizer.lr does nothing here"),
        (["sample", "RUN", "--steps", "0"], "sampling.steps=[0]"),
        (["sample", "RUN", "--guidance", "-1"], "guidance_scale=-1"),
        (["sample", "RUN", "--num", "0"], "sampling.num=0"),
        (["sample", "RUN", "--ema", "1.5"], "sampling.ema=1.5"),
        (["sample", "RUN", "sampling.guidance_interval=[0.5,0.5]"], "guidance_interval=[0.5, 0.5] is empty"),
        (["sample", "no-such.safetensors"], "no-such.safetensors does not exist"),
        (["evaluate", "RUN", "--poll", "5"], "--poll 5 is for --watch"),
        (["evaluate", "RUN", "--watch", "--poll", "0"], "--poll"),
        (["evaluate", "RUN", "--watch", "--poll", "nan"], "--poll"),
        (["evaluate", "RUN", "--watch", "--out", "x"], "--out x: --watch"),
        (["evaluate", "RUN", "--watch", "--gallery"], "--gallery: --watch"),
        (["evaluate", "RUN", "--guidance", "2", "--search", "guidance=1:2"], "--guidance 2.0: --search"),
        (["evaluate", "RUN", "sampling.guidance_scale=2", "--search", "guidance=1:2"], "guidance_scale does nothing"),
        (["evaluate", "RUN", "--guidance", "2", "--gallery"], "--guidance 2.0: --gallery"),
        (["evaluate", "RUN", "--repeats", "2", "--gallery"], "evaluation.repeats does nothing"),
        (["evaluate", "RUN", "--num", "2", "--gallery"], "sampling.num does nothing"),
        (["evaluate", "RUN", "--make-reference", "x", "--out", "r.npz"], "--make-reference draws no samples"),
        (["evaluate", "--make-reference", "x", "--out", "r"], "--out FILE.npz"),
        (
            ["evaluate", "--make-reference", "no-such-folder", "--out", "r.npz"],
            "--make-reference=no-such-folder does not",
        ),
        (
            ["evaluate", "--make-reference", "IMAGES", "--out", "r.npz", "--repeats", "3"],
            "evaluation.repeats does nothing",
        ),
        (["evaluate", "IMAGES", "--guidance", "2"], "measured as it is"),
        (["evaluate", "IMAGES", "--steps", "2"], "evaluation.steps does nothing"),
        (["evaluate", "IMAGES", "--sampler", "heun"], "sampling.sampler does nothing"),
        (
            ["evaluate", "RUN", "evaluation.extractor.file=no-such.pt"],
            "evaluation.extractor.file=no-such.pt does not exist",
        ),
    ],
)
def test_arguments_that_would_do_nothing_are_refused_before_anything_is_read(run, argv, said, capsys, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    places = {"RUN": run.url, "IMAGES": str(tmp_path / "images")}
    assert cli.main([places.get(word, word) for word in argv]) == 2
    assert said in capsys.readouterr().err


def test_guidance_of_a_run_that_always_saw_labels_is_refused_for_every_scale(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(configs.to_yaml(configs.load([], ["method.label_drop=0"]).config))
    for argv in (["sample", "--guidance", "1,1.5"], ["evaluate", "--guidance", "1,1.5"],
                 ["evaluate", "--search", "guidance=1:2"], ["sample", "sampling.guidance_scale=2"]):  # fmt: skip
        assert cli.main([argv[0], str(tmp_path), *argv[1:]]) == 2
        assert "method.label_drop above 0" in capsys.readouterr().err


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.8, 0.1), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_an_empty_interval_of_guidance_is_refused_from_python_too(interval):
    with pytest.raises(errors.UserError, match="interval of times within 0 to 1"):
        draw.SamplingPlan(1, guidance_interval=interval)


def test_a_run_without_averages_says_that_its_raw_weights_can_be_had(digits, tmp_path):
    from imm_scale.checkpoint import export
    from tests import ranks
    from tests.conftest import TINY

    overrides = [*TINY, f"data.manifest={digits}", f"run.dir={tmp_path}/run", "train.max_steps=1", "ema.decays=[]"]
    ranks.train(1, *overrides)
    with pytest.raises(errors.UserError, match=r"no moving average \(ema\.decays=\[\]\).*ema=0"):
        export.read(f"{tmp_path}/run")
    assert export.read(f"{tmp_path}/run", ema=export.RAW_WEIGHTS)[1]
