"""A run folder in an S3 bucket: checkpoints by way of local files, whatever the network does to their upload."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from imm_scale import config as configs
from imm_scale import storage
from imm_scale.checkpoint import run_lock
from imm_scale.checkpoint.format import Checkpoint, committed_steps
from imm_scale.checkpoint.run_folder import read_metrics
from imm_scale.errors import UserError
from imm_scale.parallel import world
from imm_scale.storage import retries
from tests import ranks
from tests.conftest import TINY
from tests.storage.fault_proxy import Faults, Proxy
from tests.storage.seaweed import Server

STEPS = (2, 4, 6)


def _argv(digits: str, run_dir: str, staging: Path) -> list[str]:
    steps = [f"train.max_steps={STEPS[-1]}", "train.checkpoint_every=2", "train.keep_last=9", "zero.stage=1"]
    return [*TINY, f"data.manifest={digits}", f"run.dir={run_dir}", f"train.staging_dir={staging}", *steps]


def _train(env: dict[str, str], patience: float, argv: list[str]) -> int:
    """Counts the saves that had failed by the end."""
    os.environ.update(env)
    retries.POLICY = replace(retries.POLICY, seconds=patience, longest_pause=0.3)
    from imm_scale.checkpoint.async_saver import Saver
    from imm_scale.training.trainer import train

    savers: list[Saver] = []
    finish = Saver.finish

    def noted(self: Saver) -> None:
        savers.append(self)
        finish(self)

    Saver.finish = noted  # type: ignore[method-assign]
    assert train(configs.load([], argv).config) == "completed"
    return savers[0].failed_checkpoints


@pytest.fixture(scope="module")
def local(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = str(tmp_path_factory.mktemp("local") / "run")
    ranks.train(2, *_argv(digits, run_dir, Path(run_dir)))
    return run_dir


def test_half_of_the_puts_fail_and_every_checkpoint_is_there(
    digits: str, local: str, bucket: str, server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.faults = Faults(busy=0.5, only="checkpoints/step")
    run_dir = f"{bucket}/run"
    assert ranks.run(_train, 2, server.env(proxy.port), 60.0, _argv(digits, run_dir, tmp_path)) == [0, 0]
    assert proxy.faults.done["busy"] > 10
    assert committed_steps(run_dir) == list(STEPS)
    for step in STEPS:
        there, here = Checkpoint.of_step(run_dir, step), Checkpoint.of_step(local, step)
        assert there.damaged_files() == [] and there.checksums == here.checksums
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "staged files go when they are uploaded"
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, STEPS[-1] + 1))


def test_a_store_that_takes_nothing_costs_its_checkpoint_and_no_more(
    digits: str, local: str, bucket: str, server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.faults = Faults(busy=1.0, only="checkpoints/step-00000004")
    run_dir = f"{bucket}/run"
    assert ranks.run(_train, 2, server.env(proxy.port), 2.0, _argv(digits, run_dir, tmp_path)) == [1, 1]
    assert committed_steps(run_dir) == [2, 6]
    for step in (2, 6):
        assert Checkpoint.of_step(run_dir, step).checksums == Checkpoint.of_step(local, step).checksums
    assert Checkpoint.of_step(run_dir, 2).damaged_files() == []
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, STEPS[-1] + 1))


def _take(env: dict[str, str], run_dir: str) -> str:
    os.environ.update(env)
    world.init(world.detect())
    try:
        run_lock.take(run_dir, lambda line: None)
        return "taken"
    except UserError as error:
        return str(error)
    finally:
        world.barrier()  # whoever has it lives until all have asked


def test_of_several_starts_one_gets_the_run_folder(bucket: str, server: Server) -> None:
    """Each is a process of its own, so that all clients are strangers; the next one finds the owner dead."""
    run_dir = f"{bucket}/run"
    outputs = ranks.run(_take, 4, server.env(), run_dir)
    assert outputs.count("taken") == 1, outputs
    first = run_lock.owner_of(run_dir)
    assert first is not None and sum("is in use by process" in line for line in outputs) == 3
    assert ranks.run(_take, 1, server.env(), run_dir) == ["taken"], "the owner's process is gone by now"
    second = run_lock.owner_of(run_dir)
    assert second is not None and second.token != first.token
    assert storage.list_names(f"{run_dir}/lock") == ["00000002.json"]
