"""The two exceptions the command line prints as a message, and what an OSError means to a user."""

import errno


class UserError(ValueError):
    """A mistake in a config, an argument or a file. The message names the offending value and the remedy. Exit 2."""


class RunError(RuntimeError):
    """A run that cannot go on, through no fault in what it was told. The message says why and what to try. Exit 1."""


def explain_lfs_pointer(head: bytes) -> str | None:
    """What a file that begins so is, and what to do, if Git LFS left its pointer in its place; else None."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run git lfs pull in its repository"
    return None


def explain_stand_in(head: bytes, instead_of: str) -> str | None:
    """As `explain_lfs_pointer`, and of a web page that was downloaded in place of `instead_of`, as "a tar archive"."""
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return f"a web page, not {instead_of}: the download failed, perhaps for want of a login"
    return explain_lfs_pointer(head)


_OTHER_PLACE = "choose another place"
_REMEDIES = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose a place on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "remove files of yours, or choose a place under another quota"),
    errno.EFBIG: ("no file may grow that large here", "raise the limit (ulimit -f), or write smaller files"),
    errno.EROFS: ("the file system is read-only", _OTHER_PLACE),
    errno.EACCES: ("permission denied", "ask for the rights, or choose another path"),
    errno.EPERM: ("permission denied", "ask for the rights, or choose another path"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another path"),
    errno.EISDIR: ("it is a folder, not a file", "choose another path"),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "choose a shorter one"),
    errno.ELOOP: ("its links lead in a circle", "mend them, or choose another path"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open on this machine", "end other programs"),
    errno.EIO: ("reading or writing failed", "look after the disk or the network, then run the same command again"),
    errno.ESTALE: ("the network file system lost it", "run the same command again"),
}
_KINDS = {PermissionError: errno.EACCES, NotADirectoryError: errno.ENOTDIR, IsADirectoryError: errno.EISDIR}


def explain_os_error(error: OSError) -> UserError | None:
    """What a full disk, a quota, lost rights or the like is to a user: the file, what is wrong, what to do.

    Returns:
        None for errors that rather show a mistake of the program, such as a file that is not there.
    """
    number = _KINDS.get(type(error)) if error.errno is None else error.errno  # file systems of fsspec set none
    if number not in _REMEDIES:
        return None
    what, remedy = _REMEDIES[number]
    where = f"{error.filename}: " if error.filename is not None else ""
    detail = f" ({error.strerror or error})" if error.errno in (None, errno.EIO) else ""
    return UserError(f"{where}{what}{detail}; {remedy}")
