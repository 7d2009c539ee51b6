"""Which code a run is started with: a checkout by commit and changes, an installed package by release and files."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
from dataclasses import asdict, dataclass

from imm_scale import storage

# The folder launchers/ is in: a checkout, or where the package is installed.
CODE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PACKAGE = "imm-scale"


@dataclass(frozen=True)
class Code:
    """A state of the code.

    Attributes:
        commit: "" outside git.
        diff: tracked files against the commit.
        untracked: names of the files git does not know and does not ignore.
        release: of an installed package, its version and a digest over its files; "" in a checkout.
    """

    commit: str
    diff: str
    untracked: tuple[str, ...]
    release: str = ""

    @property
    def version(self) -> str:
        """A short name that two states share only if they are the same."""
        if not self.commit:
            return self.release or "unknown"
        changes = hashlib.sha256(self.diff.encode()).hexdigest()[:8] if self.diff else ""
        return self.commit[:12] + (f"+{changes}" if changes else "")


def is_checkout() -> bool:
    """Whether this code lies in a source tree, and not where it was installed."""
    return os.path.exists(os.path.join(CODE, "pyproject.toml"))


def job_folders() -> tuple[str, str | None]:
    """(where a job runs, where its launchers/ is). A checkout is both, and the second None; with installed code a job
    runs where it is submitted from."""
    return (CODE, None) if is_checkout() else (os.getcwd(), CODE)


def _git(*args: str) -> str:
    # Only this checkout's own repository: a copy without .git inside another repository is not that one's state.
    if not os.path.exists(os.path.join(CODE, ".git")):
        return ""
    try:
        result = subprocess.run(["git", "-C", CODE, *args], capture_output=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.decode(errors="replace") if result.returncode == 0 else ""


def _release() -> str:
    """Version and digest of the package installed at CODE; its RECORD holds a hash of every file."""
    try:
        package = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return ""
    if os.path.realpath(str(package.locate_file(""))) != os.path.realpath(CODE):
        return ""
    hashes = sorted(f"{file} {file.hash.value}" for file in package.files or () if file.hash and file.suffix != ".pyc")
    return f"{package.version}+{hashlib.sha256(chr(10).join(hashes).encode()).hexdigest()[:8]}"


def read() -> Code:
    """The code as it is now."""
    untracked = _git("ls-files", "--others", "--exclude-standard").splitlines()
    commit = _git("rev-parse", "HEAD").strip()
    return Code(commit, _git("diff", "HEAD"), tuple(untracked), "" if is_checkout() else _release())


def save(folder: str, code: Code, config: str, script: str) -> None:
    """Writes code.json, code.diff, config.yaml (resolved) and script.sbatch into a folder, a path or an fsspec URL."""
    about = {key: value for key, value in asdict(code).items() if key != "diff"}
    storage.write_text(storage.join(folder, "code.json"), json.dumps(about, indent=1))
    storage.write_text(storage.join(folder, "code.diff"), code.diff)
    storage.write_text(storage.join(folder, "config.yaml"), config)
    storage.write_bytes(storage.join(folder, "script.sbatch"), script.encode("utf-8", "surrogateescape"))
