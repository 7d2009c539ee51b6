"""Which code a run is started with, in a checkout and where the package was installed."""

import hashlib
import subprocess
import sys
from pathlib import Path

from launchers.records import snapshot

ROOT = Path(__file__).parents[4]


def test_a_checkout_is_its_commit():
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    code = snapshot.read()
    assert code.commit == head.stdout.strip() and code.release == ""
    assert snapshot.job_folders() == (str(ROOT), None)


def _install(folder: Path, text: str) -> None:
    """A package of that name, as pip leaves it behind."""
    about = folder / "imm_scale-2.5.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: imm-scale\nVersion: 2.5\n")
    (about / "RECORD").write_text(f"imm_scale/a.py,sha256={text},3\nimm_scale/__pycache__/a.pyc,,\n")
    (folder / "imm_scale").mkdir()  # from Python 3.12 on, files that are gone are not listed
    (folder / "imm_scale" / "a.py").touch()


def test_an_installed_package_is_its_release_and_files(tmp_path, monkeypatch):
    """Also inside a repository of the user's, whose commit says nothing of it."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    versions = []
    for name, text in (("one", "AAAA"), ("other", "BBBB")):
        folder = tmp_path / name
        _install(folder, text)
        monkeypatch.setattr(snapshot, "CODE", str(folder))
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
        assert snapshot.job_folders() == (str(Path.cwd()), str(folder))
        assert snapshot.read().commit == ""
        versions.append(snapshot.read().version)
    digest = hashlib.sha256(b"imm_scale/a.py AAAA").hexdigest()[:8]
    assert versions[0] == f"2.5+{digest}" and versions[1].startswith("2.5+") and versions[1] != versions[0]


def test_a_copy_that_nobody_installed_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "CODE", str(tmp_path))
    assert snapshot.read().version == "unknown"
