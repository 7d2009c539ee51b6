"""Which code a run was started with: commit and changes of the checkout."""

import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass

from imm_scale import storage
from launchers.cluster import CHECKOUT


@dataclass(frozen=True)
class Code:
    """A state of the checkout.

    Attributes:
        commit: "" outside git.
        diff: tracked files against the commit.
        untracked: names of the files git does not know and does not ignore.
    """

    commit: str
    diff: str
    untracked: tuple[str, ...]

    @property
    def version(self) -> str:
        """A short name that two states share only if they are the same."""
        if not self.commit:
            return "unknown"
        changes = hashlib.sha256(self.diff.encode()).hexdigest()[:8] if self.diff else ""
        return self.commit[:12] + (f"+{changes}" if changes else "")


def _git(*words: str) -> str:
    try:
        # Only this checkout's own repository: a copy without .git inside another repository is not that one's state.
        done = subprocess.run(["git", "-C", CHECKOUT, *words], capture_output=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def read() -> Code:
    """The checkout as it is now."""
    untracked = _git("ls-files", "--others", "--exclude-standard").splitlines()
    return Code(_git("rev-parse", "HEAD").strip(), _git("diff", "HEAD"), tuple(untracked))


def save(folder: str, code: Code, config: str, script: str) -> None:
    """Writes code.json, code.diff, config.yaml (resolved) and script.sbatch into a folder, a path or an fsspec URL."""
    about = {key: value for key, value in asdict(code).items() if key != "diff"}
    storage.write_text(storage.join(folder, "code.json"), json.dumps(about, indent=1))
    storage.write_text(storage.join(folder, "code.diff"), code.diff)
    storage.write_text(storage.join(folder, "config.yaml"), config)
    storage.write_bytes(storage.join(folder, "script.sbatch"), script.encode("utf-8", "surrogateescape"))
