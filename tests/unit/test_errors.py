"""What a user is told of a full disk, a quota, lost rights."""

import errno
import os
from pathlib import Path

import pytest

from imm_scale import storage
from imm_scale.errors import explain_os_error
from tests.full_disk import file_size_limit


@pytest.mark.parametrize(
    ("number", "phrase"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_the_file_what_is_wrong_and_what_to_do(number, phrase):
    message = str(explain_os_error(OSError(number, os.strerror(number), "/data/out/a.tar")))
    assert message.startswith("/data/out/a.tar: ") and phrase in message and "; " in message


def test_rights_of_file_systems_that_set_no_number():
    assert "permission denied (not yours)" in str(explain_os_error(PermissionError("not yours")))


def test_other_errors_stay_what_they_are():
    assert explain_os_error(FileNotFoundError(errno.ENOENT, "no such file", "a")) is None
    assert explain_os_error(OSError("without a number")) is None


def test_a_file_that_must_not_grow_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """The system's own error of a write names no file."""
    target = tmp_path / "weights.bin"
    with file_size_limit(1000), pytest.raises(OSError) as raised:
        storage.write_bytes(str(target), bytes(5000))
    assert str(explain_os_error(raised.value)).startswith(f"{target}: no file may grow that large here")
    assert list(tmp_path.iterdir()) == []
