"""wandb beside a run: offline without a key, refused where it could only fail, and never in the way."""

import functools
import sys
import types
from pathlib import Path

import pytest

from imm_scale import config as configs
from imm_scale.config.schema import Config
from imm_scale.data.tokens.spaces import TokensConfig
from imm_scale.training import run_log
from imm_scale.training.run_log import Progress, Wandb
from tests import ranks


class _FakeRun:
    id = "abc"

    def __init__(self, fails_at: str):
        self.fails_at, self.logged, self.artifacts = fails_at, [], []

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def _do(self, what: str) -> None:
        if what == self.fails_at:
            raise RuntimeError(f"no {what} today")  # not even one of wandb's own errors

    def log(self, record: dict) -> None:
        self._do("log")
        self.logged.append(record)

    def log_artifact(self, artifact: "_FakeArtifact") -> None:
        self._do("upload")
        self.artifacts.append(artifact)

    def finish(self) -> None:
        self._do("finish")
        self.logged.append("finished")


class _FakeArtifact:
    def __init__(self, name: str, type: str):
        self.name, self.files = name, []

    def add_file(self, path: str) -> None:
        self.files.append(path)


@pytest.fixture
def fake_wandb(monkeypatch):
    """A stand-in whose run fails where it is told to; `arguments` are those of init."""
    module = types.ModuleType("wandb")
    module.fails_at, module.run, module.arguments = "", None, {}

    def init(**arguments):
        if module.fails_at == "init":
            raise TimeoutError("no init today")
        module.arguments, module.run = arguments, _FakeRun(module.fails_at)
        return module.run

    module.init, module.login = init, lambda prompt: False
    module.Settings = module.Image = lambda *args, **kwargs: (args, kwargs)
    module.Artifact = _FakeArtifact
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def _config(run_dir: Path, *overrides: str) -> Config:
    return configs.load([], [f"run.dir={run_dir}", "wandb.mode=auto", *overrides]).config


@pytest.mark.parametrize("fails_at", ["init", "log", "upload", "finish"])
def test_a_wandb_that_raises_stops_nothing(fails_at, fake_wandb, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("imm_scale.training.run_log.log.propagate", True)
    (tmp_path / "report.html").write_text("<p>")
    fake_wandb.fails_at = fails_at
    wandb = Wandb(_config(tmp_path))
    wandb.log({"step": 1, "loss": 0.5})
    wandb.log({"step": 2, "loss": 0.4})
    wandb.finish()
    assert caplog.text.count("wandb is off from here on") == 1
    assert f"no {fails_at} today" in caplog.text


def test_what_wandb_is_told(fake_wandb, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)  # so that a missing key decides
    grid = tmp_path / "samples" / "step-00000002" / "steps-4.png"
    grid.parent.mkdir(parents=True)
    grid.write_bytes(b"")
    (tmp_path / "report.html").write_text("<p>")
    wandb = Wandb(_config(tmp_path, "wandb.project=p", "wandb.group=g", "wandb.tags=[a,b]", "run.name=n"))
    wandb.log({"step": 1, "loss": 0.5})
    wandb.finish()
    told = fake_wandb.arguments
    expected = {"mode": "offline", "project": "p", "name": "n", "group": "g", "tags": ["a", "b"], "resume": "allow"}
    assert {name: told[name] for name in expected} == expected
    first, again = told["id"], Wandb(_config(tmp_path))
    assert again is not None
    assert fake_wandb.arguments["id"] == first, "the same folder is the same run, however often it is resumed"
    wandb_run = wandb._run
    assert wandb_run.logged[0] == {"step": 1, "loss": 0.5}
    assert list(wandb_run.logged[1]) == ["samples/step-00000002/steps-4"]
    assert wandb_run.logged[2] == "finished"
    assert wandb_run.artifacts[0].files == [str(tmp_path / "report.html")]


def _without_a_key(home: str, *argv: str) -> tuple[int, str]:
    import os

    os.environ["HOME"] = home
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        os.environ.pop(name, None)
    return ranks.command_and_output(*argv)


def test_online_without_a_key_is_refused_on_all_ranks(tiny, tmp_path):
    settings = [*tiny, "train.max_steps=1", "wandb.mode=online"]
    for code, output in ranks.run(_without_a_key, 2, str(tmp_path), "train", *settings):
        assert code == 2
        assert "WANDB_API_KEY" in output
        assert "wandb.mode=offline" in output
    assert not (tmp_path / "run").exists()


def test_a_record_without_a_loss_is_shown(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    Progress("run", 0, 10, True).report({"step": 3, "loss": None, "grad_norm": None, "images_per_second": 10.0})
    assert "run: step 3/10  loss -  grad norm -  10 images/s" in capsys.readouterr().err


def test_lines_take_the_place_of_a_bar_that_is_switched_off(capsys, monkeypatch):
    """TQDM_DISABLE=1, which tqdm reads when it is imported: for several runs on one terminal."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(run_log, "tqdm", functools.partial(run_log.tqdm, disable=True))
    progress = Progress("run", 0, 10, True)
    progress.advance()
    progress.report({"step": 3, "loss": 0.5, "grad_norm": 1.0, "images_per_second": 10.0})
    assert capsys.readouterr().err == "run: step 3/10  loss 0.5  grad norm 1  10 images/s\n"
    run_log.Progress("run", 0, 10, enabled=True, unit=TokensConfig.UNIT).report(
        {"step": 3, "loss": 0.5, "grad_norm": 1.0, "images_per_second": 10.0}
    )
    assert capsys.readouterr().err.endswith("10 sequences/s\n")
