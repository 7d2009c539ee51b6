"""A real Chromium, driven over its debugging pipe: opens pages, counts complaints, measures what is shown."""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

_INSTALL = Path(__file__).parent / "install_chromium.sh"
_TIMEOUT = 60.0
# Pictures that did not load or have no size, and how far the page reaches beyond the window.
_LOOK = """({
  pictures: document.images.length,
  broken: [...document.images].filter(i => !i.complete || i.naturalWidth === 0 || i.clientWidth < 40).map(i => i.alt),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  width: window.innerWidth,
  least_text: Math.min(...[...document.querySelectorAll('p, li, td, h1, h2, figcaption')]
    .map(e => parseFloat(getComputedStyle(e).fontSize))),
  text: document.body.innerText,
})"""


def find() -> str:
    """The chromium to use; skips the test, with one line, where there is none and none can be had."""
    if shutil.which("chromium") is None:
        done = subprocess.run([str(_INSTALL)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip((done.stdout + done.stderr).strip().splitlines()[-1])
    chromium = shutil.which("chromium")
    assert chromium is not None
    return chromium


class Browser:
    """A headless Chromium with a profile of its own; a context manager.

    Attributes:
        complaints: errors and warnings of the console, uncaught exceptions, and requests that failed.
    """

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self._next = 0
        self._buffer = b""
        self._session: str | None = None

    def __enter__(self) -> "Browser":
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        command = [find(), *options, f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe", "about:blank"]
        # The debugging pipe is file descriptors 3 and 4 of the browser.
        moves = f"60<&{to_read} 61>&{to_write} 3<&60 4>&61"  # by way of numbers that neither end of a pipe has
        argv = ["bash", "-c", f'exec "$@" {moves}', "bash", *command]
        with open(os.devnull, "w") as nowhere:
            self._process = subprocess.Popen(argv, pass_fds=(to_read, to_write), stdout=nowhere, stderr=nowhere)
        os.close(to_read)
        os.close(to_write)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def look(self, path: Path, width: int) -> dict[str, Any]:
        """Opens a local page in a window of so many pixels and says what is to be seen (see _LOOK)."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + _TIMEOUT
        while self._evaluate("document.readyState") != "complete" and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._evaluate(_LOOK)

    def picture(self, out: Path) -> None:
        """Writes a PNG of the whole page that is open."""
        import base64

        data = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        out.write_bytes(base64.b64decode(data))

    def _evaluate(self, expression: str) -> Any:
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._next:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], _TIMEOUT)
            assert ready, f"chromium said nothing for {_TIMEOUT} s"
            data = os.read(self._from, 1 << 16)
            assert data, "chromium has gone"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.loadingFailed":
            self.complaints.append(params["errorText"])
