"""A pass over many rows in batches, with a bar, that goes on where it was stopped.

Values of rows already there are kept as `NAME-START-STOP.npy` in a folder whose name is a hash of all they depend on.
The first rows are computed again and compared, for of a model that is Python code no hash is known.
"""

import hashlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from imm_scale import storage
from imm_scale.errors import UserError

Rows = Callable[[int, int], NDArray[np.float64]]
_WRITE_SECONDS = 30.0
_SAME = 0.01  # nats: batches of another size round differently, other weights differ by more


class Parts:
    """Values by row, kept in a folder or in memory alone.

    Args:
        folder: where the results go; None keeps nothing.
        identity: all that the values depend on, as JSON.
        batch: rows computed at once.
    """

    def __init__(self, folder: str | None, identity: Mapping[str, Any], batch: int):
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        self._folder = None if folder is None else storage.join(folder, f"scores-{key}")
        self._batch = batch

    def collect(self, name: str, rows: Rows, total: int) -> NDArray[np.float64]:
        """The values of all rows, (total, ...).

        Args:
            rows: the values of rows start to stop, (stop - start, ...).

        Raises:
            UserError: values in the folder that are not this model's.
        """
        kept = self._read(name)
        done = sum(map(len, kept))
        if done:
            self._compare(name, rows(0, min(self._batch, len(kept[0]))), kept[0])
        return np.concatenate([*kept, *self._computed(name, rows, done, total)])

    def _computed(self, name: str, rows: Rows, done: int, total: int) -> list[NDArray[np.float64]]:
        """The pieces from row `done` on, written now and then, and whatever ends this."""
        pieces, new, last = list[NDArray[np.float64]](), list[NDArray[np.float64]](), time.monotonic()
        hidden = not sys.stderr.isatty()
        with tqdm(total=total, initial=done, desc=name, unit="row", disable=hidden, leave=False) as bar:
            try:
                for start in range(done, total, self._batch):
                    new.append(rows(start, min(start + self._batch, total)))
                    bar.update(len(new[-1]))
                    if time.monotonic() - last > _WRITE_SECONDS:
                        self._move(name, new, pieces, done)
                        last = time.monotonic()
            finally:
                self._move(name, new, pieces, done)
        return pieces

    def _move(self, name: str, new: list[NDArray[np.float64]], pieces: list[NDArray[np.float64]], done: int) -> None:
        """Writes what is new as one piece."""
        if new:
            start = done + sum(map(len, pieces))
            pieces.append(np.concatenate(new))
            new.clear()
            self._write(name, start, pieces[-1])

    def _read(self, name: str) -> list[NDArray[np.float64]]:
        """The pieces that follow each other from row 0 on."""
        if self._folder is None:
            return []
        found = [re.fullmatch(rf"{name}-(\d+)-(\d+)\.npy", file) for file in storage.list_names(self._folder)]
        spans = {int(match[1]): int(match[2]) for match in found if match}
        pieces, row = list[NDArray[np.float64]](), 0
        while row in spans:
            url = storage.join(self._folder, _file(name, row, spans[row]))
            pieces.append(np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False))
            row = spans[row]
        return pieces

    def _write(self, name: str, start: int, values: NDArray[np.float64]) -> None:
        if self._folder is not None:
            buffer = io.BytesIO()
            np.save(buffer, values)
            storage.write_bytes(storage.join(self._folder, _file(name, start, start + len(values))), buffer.getvalue())

    def _compare(self, name: str, again: NDArray[np.float64], kept: NDArray[np.float64]) -> None:
        difference = float(np.abs(again - kept[: len(again)]).max())
        if not difference <= _SAME:
            raise UserError(
                f"{self._folder} has {name} scores of another model: the first rows differ by {difference:.3g} nats. "
                "Choose another --out, or remove that folder"
            )


def _file(name: str, start: int, stop: int) -> str:
    return f"{name}-{start:09d}-{stop:09d}.npy"
