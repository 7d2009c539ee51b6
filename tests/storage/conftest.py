"""One S3 server for the session, and what its clients need."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from imm_scale.storage import files
from tests.storage.fault_proxy import Proxy
from tests.storage.seaweed import Server


def use_store(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process's S3 traffic there."""
    import fsspec

    for key, value in env.items():
        monkeypatch.setenv(key, value)
    files._filesystem.cache_clear()
    files._signed.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("seaweed"))
    started.start()
    yield started
    started.kill()


@pytest.fixture
def bucket(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """URL of an empty bucket, reached without a proxy."""
    use_store(server.env(), monkeypatch)
    name = f"b{abs(hash(str(tmp_path))) % 10**12}"
    files._filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()
