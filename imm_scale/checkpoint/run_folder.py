"""What a run leaves in its folder for others to read: status.json and metrics.jsonl."""

import importlib.metadata
import json
import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

from imm_scale import storage
from imm_scale.errors import UserError
from imm_scale.parallel import world

Record = dict[str, Any]
METRICS = "metrics.jsonl"
STATUS = "status.json"
_SEGMENTS = "metrics"

log = logging.getLogger("imm_scale")


def write_status(run_dir: str, state: str, **details: Any) -> None:
    """status.json: running | completed | preempted | failed, with step, reason, host and rank. Rank 0 writes it."""
    status = {"state": state, "host": world.hostname(), "time": time.time(), **details}
    storage.write_text(storage.join(run_dir, STATUS), json.dumps(status, indent=1))


def write_progress(run_dir: str, **details: Any) -> None:
    """Status `running`, unless some rank has said that the run failed, for launchers act on that."""
    if read_status(run_dir).get("state") != "failed":
        write_status(run_dir, "running", **details)


def write_failure(run_dir: str, reason: str, **details: Any) -> None:
    """Status `failed`, unless some rank has already said so: the first failure is the cause of those that follow."""
    if read_status(run_dir).get("state") != "failed":
        write_status(run_dir, "failed", reason=reason, **details)


def read_status(run_dir: str) -> Record:
    """The last status, or {} for a folder that has none."""
    text = _text(storage.join(run_dir, STATUS))
    try:
        status = json.loads(text) if text else {}
    except ValueError:
        status = None
    if not isinstance(status, dict):
        log.warning("%s is damaged: what the run was doing last is not known", storage.join(run_dir, STATUS))
        return {}
    return status


def _text(url: str) -> str:
    """A file's text, "" where there is none, or none any more."""
    try:
        return storage.read_bytes(url).decode(errors="replace")
    except FileNotFoundError:
        return ""


def _parse(text: str, url: str) -> list[Record]:
    """Records of JSON lines; a last line torn by a kill is left out. Raises UserError for another that is damaged."""
    records = [_record(line) for line in text.splitlines()]
    for number, record in enumerate(records[:-1], 1):
        if record is None:
            raise UserError(
                f"{url}:{number} is no record of a step, the file is damaged: restore it, or take out the line"
            )
    return [record for record in records if record is not None]


def _record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def read_metrics(run_dir: str) -> list[Record]:
    """All records of a run, in order of steps. Raises UserError for a damaged file."""
    url = storage.join(run_dir, METRICS)
    if storage.is_local(run_dir):
        return _parse(_text(url), url)
    segments = storage.join(run_dir, _SEGMENTS)
    urls = [storage.join(segments, name) for name in storage.list_names(segments)]
    return [record for url in urls for record in _parse(_text(url), url)]  # resumed, a run takes back later segments


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


class MetricsLog:
    """metrics.jsonl of a run: appended to as it goes, and cut back to the last commit on resume.

    Object stores cannot append: with a remote run folder the records wait in memory and go up as a numbered segment
    at each commit. On a disk that takes nothing more they wait too, until it does.

    Args:
        run_dir: the run's folder.
        step: the step resumed from; records past it are dropped.
    """

    def __init__(self, run_dir: str, step: int):
        self._run_dir = run_dir
        self._local = storage.is_local(run_dir)
        self._unwritten: list[Record] = []
        if self._local:
            text = _lines(record for record in read_metrics(run_dir) if record["step"] <= step)
            storage.write_text(storage.join(run_dir, METRICS), text)
            self._size, self._warned = len(text.encode()), False
        else:
            segments = storage.join(run_dir, _SEGMENTS)
            for name in storage.list_names(segments):
                if int(name.removesuffix(".jsonl")) > step:
                    storage.remove(storage.join(segments, name))

    def append(self, record: Record) -> None:
        """Adds a record; a local file has it at once, an object store at the next commit."""
        self._unwritten.append(record)
        if self._local:
            self._write()

    def _write(self) -> None:
        """Appends what waits, over whatever half of it a full disk took before."""
        data = _lines(self._unwritten).encode()
        try:
            with open(storage.local_path(storage.join(self._run_dir, METRICS)), "r+b") as file:
                file.seek(self._size)
                file.truncate()
                file.write(data)
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written, its records wait in memory: %s", METRICS, error)
            self._warned = True
            return
        self._size, self._unwritten, self._warned = self._size + len(data), [], False

    def commit(self, step: int) -> None:
        """Call after the checkpoint of that step is committed; the records up to it are kept from then on.

        Another thread may append later records meanwhile.
        """
        ready = [record for record in self._unwritten if record["step"] <= step]
        if ready and not self._local:
            storage.write_text(storage.join(self._run_dir, _SEGMENTS, f"{step:08d}.jsonl"), _lines(ready))
            del self._unwritten[: len(ready)]


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers; a checkout need not be installed."""
    names = ("imm-scale", "torch", "deepspeed", "numpy", "webdataset", "safetensors")
    return {"python": sys.version.split()[0], **{name: _version(name) for name in names}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
