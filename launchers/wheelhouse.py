"""Wheels for a machine without a network: `python -m launchers.wheelhouse --python 3.12 --have torch,numpy,...`

Resolves what imm-scale needs for another Python on Linux, with the packages that machine has played by empty wheels
that need nothing, and leaves in wheelhouse/ what is missing there. Run it where there is a network; copy the folder;
install with the line it prints. A package that publishes no wheels is built here, if it is pure Python.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from imm_scale.errors import UserError

_CHECKOUT = Path(__file__).resolve().parents[1]
_ONLY_SOURCES = ("deepspeed",)  # what publishes no wheels
_LACKING = re.compile(r"No matching distribution found for ([\w.-]+)")


@dataclass(frozen=True)
class Target:
    """The machine without a network.

    Attributes:
        python: its version, "3.12".
        have: {name: version} of the packages there.
        glibc: the 28 of its glibc 2.28.
        machine: what uname -m says there.
    """

    python: str
    have: Mapping[str, str]
    glibc: int = 28
    machine: str = "x86_64"

    def options(self) -> list[str]:
        """For pip: the wheels that run there, newer tags first."""
        tags = [f"2_{minor}" for minor in range(self.glibc, 4, -1)]
        platforms = [f"manylinux_{tag}" for tag in tags] + ["manylinux2014", "manylinux2010", "manylinux1"]
        python = ["--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}"]
        return python + [f"--platform={platform}_{self.machine}" for platform in platforms]


def required(extras: Iterable[str], pyproject: str) -> list[str]:
    """What the project asks for, with these extras, as the text of its pyproject.toml says."""
    project = tomllib.loads(pyproject)["project"]
    optional = project["optional-dependencies"]
    for extra in extras:
        if extra not in optional:
            raise UserError(f"the extra {extra!r} does not exist: choose from {', '.join(optional)}")
    return [*project["dependencies"], *(requirement for extra in extras for requirement in optional[extra])]


def pinned(constraints: str) -> dict[str, str]:
    """{name: version} of the tested set."""
    lines = (line.split("#")[0].strip() for line in constraints.splitlines())
    return {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }


def had(packages: Iterable[str], pins: Mapping[str, str]) -> dict[str, str]:
    """{name: version} of what the machine has, "numpy" or "torch==2.11.0"; a version not said is the tested one."""
    pairs = [package.partition("==") for package in packages]
    return {(name := canonicalize_name(package)): version or pins.get(name, "0") for package, _, version in pairs}


def stand_in(folder: Path, name: str, version: str) -> Path:
    """An empty wheel that needs nothing."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: stand-in\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in texts.items():
            wheel.writestr(f"{stem}.dist-info/{file}", text)
    return path


def constraints_with(pins: Mapping[str, str], stand_ins: Mapping[str, Path]) -> str:
    """The tested versions, and the stand-ins in place of what the machine has."""
    lines = [f"{name}=={version}" for name, version in pins.items() if name not in stand_ins]
    return "\n".join([*lines, *(f"{name} @ {path.as_uri()}" for name, path in stand_ins.items())]) + "\n"


def needs(wheel: Path, python: str) -> Iterable[str]:
    """Names of what a wheel needs on that Python: pip judges markers by the Python it runs on."""
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(file.read(name).decode())
    target = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    for line in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(target):
            yield canonicalize_name(requirement.name)


def missing(wheels: Iterable[Path], have: Iterable[str], python: str) -> list[str]:
    """What the wheels need on that Python and is neither among them nor on the machine."""
    wheels = list(wheels)
    present = {parse_wheel_filename(wheel.name)[0] for wheel in wheels} | set(have)
    return sorted({name for wheel in wheels for name in needs(wheel, python)} - present)


def _pip(*args: str) -> None:
    env = {**os.environ, "DS_BUILD_OPS": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run([sys.executable, "-m", "pip", *args], env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        lacking = _LACKING.search(result.stderr)
        what = f"{lacking[1]} has no wheel for that Python and platform; " if lacking else ""
        remedy = "name it under BUILD if it is pure Python, or under HAVE with the version the machine has"
        raise UserError(f"{what}{remedy}. pip said:\n{result.stderr.strip()[-2000:]}")


def build(name: str, version: str | None, out: Path) -> None:
    """Builds a wheel from a package's source. Raises UserError where it is not pure Python."""
    with tempfile.TemporaryDirectory() as folder:
        _pip("wheel", "--no-deps", "--wheel-dir", folder, f"{name}=={version}" if version else name)
        (wheel,) = Path(folder).glob("*.whl")
        if not wheel.name.endswith("-none-any.whl"):
            raise UserError(f"{name} compiles code for this machine ({wheel.name}): build it on one like the target")
        shutil.move(wheel, out / wheel.name)


def collect(
    requirements: Sequence[str], target: Target, pins: Mapping[str, str], sources: Sequence[str], out: Path
) -> list[Path]:
    """Puts the missing wheels into a folder, in place of those that lie there; their paths.

    Args:
        sources: packages to be built.

    Raises:
        UserError: a package without a wheel for that Python and platform, or versions that do not go together.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.whl"):
        old.unlink()
    for name in sources:
        if canonicalize_name(name) not in target.have:
            build(name, pins.get(canonicalize_name(name)), out)
    with tempfile.TemporaryDirectory() as folder:
        stand_ins = {name: stand_in(Path(folder), name, version) for name, version in target.have.items()}
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(constraints_with(pins, stand_ins))
        options = [*target.options(), f"--dest={out}", f"--find-links={out}", f"--constraint={constraints}"]
        packages, more = list(requirements), [""]
        while more:
            _pip("download", *options, *packages)
            for path in stand_ins.values():
                (out / path.name).unlink(missing_ok=True)
            more = missing(out.glob("*.whl"), target.have, target.python)
            assert not set(more) & set(packages), more
            packages += more
    return sorted(out.glob("*.whl"))


def summary(wheels: Sequence[tuple[str, int]], out: str, python: str, names: Sequence[str]) -> str:
    """What was collected, by (file, bytes), and the line that installs it."""
    lines = [f"{size / 2**20:8.2f} MiB  {name}" for name, size in wheels]
    total = sum(size for _, size in wheels) / 2**20
    return "\n".join(
        [
            *lines,
            f"{total:8.2f} MiB  in {len(wheels)} wheels for Python {python}: copy {out}/ to the machine and there",
            f"  python{python} -m pip install --no-index --find-links {out} {' '.join(names)}",
            "or, where the environment is read-only, into a folder that PYTHONPATH then names:",
            f"  python{python} -m pip install --no-index --no-deps --target site {out}/*.whl",
        ]
    )


def _items(text: str) -> list[str]:
    return [item for item in re.split(r"[\s,]+", text) if item]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 the user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", help="of the machine")
    parser.add_argument("--have", type=_items, default=[], help="what it has: torch==2.11.0,numpy,...")
    parser.add_argument("--extras", type=_items, default=["vae"], help="of pyproject.toml")
    parser.add_argument("--build", type=_items, default=list(_ONLY_SOURCES), help="what publishes sources only")
    parser.add_argument("--glibc", type=int, default=28, help="the 28 of its glibc 2.28 (ldd --version)")
    parser.add_argument("--machine", default="x86_64", help="uname -m there")
    parser.add_argument("--out", default="wheelhouse")
    args = parser.parse_args(argv)
    try:
        if not (_CHECKOUT / "constraints.txt").exists():
            raise UserError(f"{_CHECKOUT} has no constraints.txt: collect wheels in a checkout")
        pins = pinned((_CHECKOUT / "constraints.txt").read_text())
        requirements = required(args.extras, (_CHECKOUT / "pyproject.toml").read_text())
        target = Target(args.python, had(args.have, pins), args.glibc, args.machine)
        wheels = collect(requirements, target, pins, args.build, Path(args.out))
    except UserError as error:
        print(f"launchers.wheelhouse: {error}", file=sys.stderr)
        return 2
    names = [name for line in requirements if (name := canonicalize_name(Requirement(line).name)) not in target.have]
    sizes = [(wheel.name, wheel.stat().st_size) for wheel in wheels]
    print(summary(sizes, args.out, args.python, names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
