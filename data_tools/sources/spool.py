"""A temporary copy of what a source holds in a form that cannot be read in any order."""

import contextlib
import tempfile

from imm_scale.errors import UserError, explain_os_error


class Spool:
    """A file that is only there as long as this object, in the folder that TMPDIR names."""

    def __init__(self, source: str) -> None:
        self._source = source
        try:
            self._file = tempfile.NamedTemporaryFile(prefix="imm-pack-", suffix=".images")  # noqa: SIM115 - lives on
        except FileNotFoundError as error:  # Python tried several folders
            raise UserError(
                f"{source} needs a temporary file ({error.strerror}): set TMPDIR=/some/folder to one with free space"
            ) from error

    @property
    def name(self) -> str:
        """Its path."""
        return self._file.name

    def write(self, data: bytes) -> int:
        """Appends, and returns where the data begin. Raises UserError where the disk is full or the like."""
        try:
            offset = self._file.tell()
            self._file.write(data)
        except OSError as error:
            raise self._explained(error) from error
        return offset

    def flush(self) -> None:
        """Everything written can be read by other processes afterwards. Raises UserError as `write`."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> Exception:
        error.filename = self.name
        with contextlib.suppress(OSError):  # it tries to write the rest once more, and is removed
            self._file.close()
        mistake = explain_os_error(error)
        if mistake is None:
            return error
        return UserError(f"{mistake}; {self._source} is copied to a temporary file: TMPDIR=/some/folder says where")
