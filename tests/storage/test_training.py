"""Training from a real S3 server: the same bits as from local files, whatever the network does."""

import json
import os
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_tools import encode
from imm_scale import storage
from imm_scale.data.loader import Loader
from imm_scale.data.manifest import Manifest
from imm_scale.data.sample_order import Layout
from imm_scale.storage import retries
from tests import ranks
from tests.conftest import TINY, losses
from tests.storage.conftest import use_store
from tests.storage.fault_proxy import Faults, Proxy
from tests.storage.seaweed import Server

SOAK = int(os.environ.get("IMM_SOAK", "1"))  # as `make soak` sets it
STEPS = 12 * SOAK  # blocks of 8 are used up in 8 steps, and little more than what is in use is read ahead


def _train(env: dict[str, str], argv: list[str]) -> int:
    os.environ.update(env)
    if SOAK == 1:  # else a server that is back after a second is missed for ten
        retries.POLICY = retries.RetryPolicy(longest_pause=1.0)
    return ranks.command("train", *argv)


def _run(size: int, env: dict[str, str], manifest: str, run_dir: Path, *more: str) -> list[int]:
    steps = [f"train.max_steps={STEPS}", "train.checkpoint_every=5", "data.block_samples=8"]
    argv = [*TINY, f"data.manifest={manifest}", f"run.dir={run_dir}", *steps, *more]
    return ranks.run(_train, size, env, argv)


@pytest.fixture(scope="module")
def local(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("local") / "run"
    assert _run(2, {}, digits, run_dir) == [0, 0]
    return run_dir


def _copy(digits: str, bucket: str) -> str:
    """Encodes the digits to S3 and checks every file against the local ones."""
    images = storage.join(storage.parent(storage.parent(digits)), "images")
    out = storage.join(bucket, "latents")
    assert encode.main(["--images", images, "--out", out, "--codec", "pixels"]) == 0
    names = storage.list_names(storage.parent(digits))
    assert storage.list_names(out) == names
    for name in names:
        assert storage.read_bytes(storage.join(out, name)) == Path(storage.parent(digits), name).read_bytes(), name
    return storage.join(out, "manifest.json")


def _last_record(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])


def test_s3_gives_the_bits_of_local_files(
    digits: str, local: Path, bucket: str, server: Server, tmp_path: Path
) -> None:
    manifest = _copy(digits, bucket)
    assert Manifest.load(manifest).hash == Manifest.load(digits).hash
    assert _run(2, server.env(), manifest, tmp_path / "run") == [0, 0]
    assert losses(tmp_path / "run") == losses(local)
    assert _last_record(tmp_path / "run")["data_bytes"] == _last_record(local)["data_bytes"] > 0


def test_a_bad_network_changes_nothing(
    digits: str, local: Path, bucket: str, server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    """503s, cut bodies, 2 s spikes, a wrong byte, and a server that is killed and comes back."""
    manifest = _copy(digits, bucket)
    proxy.faults = Faults(busy=0.2, cut=0.1, slow=0.02, flips=2)
    run_dir = tmp_path / "run"
    reached = threading.Event()

    def restart() -> None:
        while not (run_dir / "metrics.jsonl").exists():
            time.sleep(0.05)
        server.kill()
        time.sleep(1)
        server.start()
        reached.set()

    thread = threading.Thread(target=restart)
    thread.start()
    assert _run(2, server.env(proxy.port), manifest, run_dir) == [0, 0]
    thread.join()
    assert reached.is_set() and losses(run_dir) == losses(local)
    record, done = _last_record(run_dir), proxy.faults.done
    assert done["busy"] >= 5 and done["cut"] >= 2 and done["flip"] == 2, done
    assert record["data_retries"] >= 5 and record["data_damaged_reads"] <= 2 and record["data_skipped_blocks"] == 0


def test_a_storm_on_reading_is_counted(
    digits: str, bucket: str, server: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fault that hits a block is in the counters, and the batches are those of local files."""
    manifest = _copy(digits, bucket)
    use_store(server.env(proxy.port), monkeypatch)
    layout = Layout(64, 4, 1, 64)
    with Loader(digits, layout, 0, 0, 8) as loader:
        expected = [batch.x.numpy() for batch in islice(loader, 60 * SOAK)]
    with Loader(manifest, layout, 0, 0, 8) as loader:
        proxy.faults = Faults(busy=0.2, cut=0.1, flips=3 * SOAK)
        samples = [batch.x.numpy() for batch in islice(loader, 60 * SOAK)]
        counted = loader.counters
    np.testing.assert_array_equal(np.stack(samples), np.stack(expected))
    done = proxy.faults.done
    assert done["busy"] > 20 and done["flip"] == 3 * SOAK
    assert counted["damaged_reads"] == 3 * SOAK
    assert abs(counted["retries"] - done["busy"] - done["cut"]) <= 20  # reads ahead of the last batch go on


@pytest.mark.parametrize("wrong", [{"AWS_SECRET_ACCESS_KEY": "notthesecret"}, {"AWS_ACCESS_KEY_ID": ""}])
def test_wrong_credentials_stop_a_run_in_seconds(
    wrong: dict[str, str],
    bucket: str,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_store({**server.env(), **wrong}, monkeypatch)
    began = time.monotonic()
    manifest = storage.join(bucket, "manifest.json")
    assert ranks.command("train", *TINY, f"data.manifest={manifest}", f"run.dir={tmp_path}/run") == 2
    assert time.monotonic() - began < 10
    message = capsys.readouterr().err
    assert "credentials" in message and "AWS_SECRET_ACCESS_KEY" in message and "Traceback" not in message
    assert not any(secret in message for secret in ("notthesecret", "testsecret"))
