"""`imm-scale` as a whole: every command at hand at once, its help quick, its words completed."""

import contextlib
import errno
import io
import os
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from imm_scale import cli, shipped
from imm_scale.commands import completion, table
from imm_scale.commands.table import COMMANDS
from tests import ranks
from tests.full_disk import file_size_limit

ROOT = Path(__file__).parents[2]
RATIO = 6.0  # of the time of `python -c pass`, which is what the interpreter itself takes
LOADED = 1.5  # on a machine that runs other tests meanwhile


def _python(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, check=True)


_HELP = """
import sys
from imm_scale import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "numpy", "omegaconf", "deepspeed", "matplotlib", "shtab"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("sweep", "plan")], ids=" ".join)
def test_help_imports_nothing_heavy_and_has_an_example(command):
    text = _python("-c", _HELP, *command, "--help").stdout
    assert "example" in text
    assert f"imm-scale {' '.join(command)}".rstrip() in text.partition("example")[2]


def test_help_is_quick():
    """The two take turns, so that what else the machine does slows both."""

    def seconds(*args: str) -> float:
        start = time.perf_counter()
        _python(*args)
        return time.perf_counter() - start

    pairs = [(seconds("-c", "pass"), seconds("-m", "imm_scale", "--help")) for _ in range(9)]
    alone, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    assert ours <= RATIO * LOADED * alone, f"{ours / alone:.1f} x `python -c pass`"


_MODULES = (
    "data_tools.pack", "data_tools.encode", "data_tools.verify", "data_tools.stats", "launchers.submit",
    "launchers.sweep",
)  # fmt: skip


def _as_modules(each: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """(exit code, what is printed) of `python -m` with these words, one after the other in this process."""
    seen = []
    for module, *words in each:
        sys.argv = [module, *words]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        seen.append((ended.value.code or 0, printed.getvalue()))
    return seen


def test_python_m_is_the_same_command():
    (theirs,) = ranks.run(_as_modules, 1, [(module, "--help") for module in _MODULES])
    (ours,) = ranks.run(_as_modules, 1, [("imm_scale", module.rpartition(".")[2], "--help") for module in _MODULES])
    for module, (code, text), same in zip(_MODULES, theirs, ours, strict=True):
        assert code == 0 and "example" in text and (code, text) == same, module


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_flag_is_refused(name, capsys):
    """Whatever a command's arguments are, and wherever the flag stands."""
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--no-such-flag"])
    assert ended.value.code == 2
    assert f"imm-scale {name}: error: " in capsys.readouterr().err


def test_words_after_two_dashes_go_on_as_they_are(monkeypatch):
    from launchers import submit

    seen = []
    monkeypatch.setattr(submit, "run", lambda args: seen.append((args.positionals, args.array)) or 0)
    assert cli.main(["submit", "encode", "--array", "0-3", "--", "--images", "x", "--array", "--"]) == 0
    assert seen == [(["encode", "--images", "x", "--array", "--"], "0-3")]


def test_an_interrupted_command_says_what_to_do(monkeypatch, capsys):
    from data_tools import pack

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "pack", interrupted)
    assert pack.main(["--source", "digits", "--out", "nowhere"]) == 130
    assert capsys.readouterr().err == "imm-scale pack: interrupted; the same command goes on\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_says_what_it_leaves(name, monkeypatch, capsys):
    """In words of its own, as its table entry has them."""

    def interrupted(args):
        raise KeyboardInterrupt

    said = COMMANDS[name].load().interrupted
    monkeypatch.setattr(cli, "parse", lambda argv: SimpleNamespace(action=interrupted, command=name, interrupted=said))
    assert cli.main([name]) == 130
    assert capsys.readouterr().err == f"imm-scale {name}: interrupted; {said}\n"
    goes_on = {"train", "sample", "evaluate", "pack", "pack-tokens", "encode", "sweep", "verify", "stats", "profile"}
    assert name in goes_on or "goes on" not in said, "it starts over, or there is nothing to go on with"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((getattr(errno, name), 2) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR")),
        *((getattr(errno, name), 1) for name in ("EIO", "ESTALE", "ENFILE")),  # a launcher tries once more
    ],
)
def test_errors_of_the_system_are_messages(number, code, monkeypatch, capsys):
    from imm_scale.report import runs

    def failing(*args):
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(runs, "write_report", failing)
    assert cli.main(["report", "runs/x"]) == code
    err = capsys.readouterr().err
    assert err.startswith("imm-scale report: /some/file: ") and "; " in err and "Traceback" not in err


def test_a_reader_that_leaves_is_no_error(tmp_path):
    """As `head` does; this one is gone before the first line."""
    script = "import sys; from imm_scale import cli; sys.exit(cli.main(['explain']))"
    command = f'{sys.executable} -c "{script}" 2>{tmp_path}/err | true'
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.parametrize("flag", ["--out", "--page"])
def test_a_home_behind_an_equals_sign_is_found(flag, monkeypatch):
    """The shell knows the home in `--out ~/x`, and not in `--out=~/x`."""
    monkeypatch.setenv("HOME", "/home/ada")
    argv = {"--out": ["report", "runs/x", "--out=~/a b.html"], "--page": ["stats", "m.json", "--page=~/a b.html"]}[flag]
    args = cli.parse(argv)
    assert getattr(args, flag.removeprefix("--")) == "/home/ada/a b.html"


@pytest.mark.parametrize("argv", [["sample", "RUN", "--out=/s/${USER}/x"], ["export", "/s/${USER}/run", "--out", "x"]])
def test_a_variable_that_the_shell_did_not_replace_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2 and "single quotes" in capsys.readouterr().err


# --- full disks ---


@pytest.mark.parametrize(
    ("argv", "file"),
    [
        (["export", "RUN", "--out", "OUT/net.safetensors"], "net.safetensors"),
        (["export", "RUN", "--out", "OUT/net", "--format", "diffusers"], ""),
        (["sample", "RUN", "--steps", "1", "--num", "64", "--out", "OUT/samples"], "samples"),
        (["report", "RUN", "--out", "OUT/page.html"], "page.html"),
    ],
)
def test_where_no_file_may_grow_nothing_half_written_is_left(argv, file, trained, tmp_path, capsys):
    """As of a full disk or a quota."""
    places = {"RUN": trained}
    with file_size_limit(2000):
        code = cli.main([places.get(word, word).replace("OUT", str(tmp_path)) for word in argv])
    err = capsys.readouterr().err
    assert code == 2 and "no file may grow that large here" in err and file in err, err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 2000 and not path.name.endswith((".tmp", ".safetensors")) for path in files), files


@pytest.mark.parametrize(
    "argv",
    [
        ["export", "RUN", "--out", "FILE/net.safetensors"],
        ["sample", "RUN", "--out", "FILE/x"],
        ["report", "RUN", "--out", "FILE/x"],
        ["evaluate", "--make-reference", "RUN", "--out", "FILE/x.npz"],
        ["train", "demo", "data.manifest=DIGITS", "run.dir=FILE/x", "--dry-run"],
    ],
    ids=lambda argv: argv[0],
)
def test_places_that_cannot_be_written_to_are_refused(argv, trained, digits, tmp_path, capsys):
    (tmp_path / "a-file").touch()
    places = {"RUN": trained, "DIGITS": digits, "FILE": str(tmp_path / "a-file")}
    for name, place in places.items():
        argv = [word.replace(name, place) for word in argv]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path}/a-file: a part of the path is a file" in err, err


# --- names ---


@pytest.mark.parametrize("kind", ["recipe", "sweep", "cluster"])
def test_what_comes_along_is_found_by_its_name(kind):
    folder = {"recipe": "configs", "sweep": "configs/sweep", "cluster": "configs/cluster"}[kind]
    files = {path.stem: str(path) for path in (ROOT / folder).glob("*.yaml")}
    assert files and {name: shipped.find(kind, name) for name in shipped.names(kind)} == files


@pytest.mark.parametrize("word", ["demo.yaml", "./demo", "sweep/k", "../configs/demo", "seed=0", "", "."])
def test_a_path_or_an_override_is_no_name(word):
    assert shipped.find("recipe", word) is None


def test_a_recipe_by_name_is_its_file(tmp_path, monkeypatch):
    from imm_scale import config as configs

    by_path = configs.load_words([str(ROOT / "configs" / "imagenet256_dit_xl2.yaml"), "seed=3"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet256_dit_xl2").mkdir()  # a folder, as a run of that name may be
    assert configs.load_words(["imagenet256_dit_xl2", "seed=3"]) == by_path


def test_a_file_of_the_users_is_taken_by_its_suffix(tmp_path, monkeypatch):
    from imm_scale import config as configs

    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("seed: 17\n")
    assert configs.load_words(["demo.yaml"]).config.seed == 17
    assert configs.load_words(["demo"]).config.seed == 0


@pytest.mark.parametrize(
    ("argv", "known"),
    [
        (["train", "imagenet256_dit_xxl2"], ["did you mean imagenet256_dit_xl2", "cifar10_dit"]),
        (["sweep", "plan", "digits_scalling"], ["did you mean digits_scaling", "kernels"]),
        (["submit", "demo", "--cluster", "nowhere"], ["pyxis", "lab"]),
    ],
)
def test_an_unknown_name_lists_the_known_ones(argv, known, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(argv) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in [argv[-1], *known]), message


# --- completion ---


def _complete(tmp_path: Path, *args: str) -> set[str]:
    """What bash offers for the last word, by the script as a user would source it."""
    (tmp_path / "script.bash").write_text(completion.script("bash"))
    ask = 'source script.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _imm_scale; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", ask, "bash", "imm-scale", *args], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("args", "offered"),
    [
        (("e",), {"encode", "evaluate", "export", "explain"}),
        (("train", "imagenet256_dit_x"), {"imagenet256_dit_xl2", "imagenet256_dit_xl2_bf16", "imagenet256_dit_xl2_ts"}),
        (("train", "demo", "train.max_st"), {"train.max_steps="}),
        (("train", "demo", "--dry-run", "method.min_g"), {"method.min_gap="}),
        (("train", "my_"), {"my_run.yaml", "my_folder/"}),
        (("plan", "demo", "--gpu", "h100"), {"h100-80gb", "h100-pcie"}),
        (("sweep", "re"), {"retry"}),
        (("sweep", "submit", "digits_scaling_"), {"digits_scaling_ci"}),
        (("submit", "demo", "--cluster", "p"), {"pyxis"}),
        (("verify", "--ad"), {"--adopt"}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_bash_completes(args, offered, tmp_path):
    (tmp_path / "my_run.yaml").touch()
    (tmp_path / "my_notes.txt").touch()
    (tmp_path / "my_folder").mkdir()
    assert _complete(tmp_path, *args) == offered


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_gets_commands_recipes_and_keys(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert '"(*)' not in text, "zsh would offer the first of many words only"
    assert all(word in text for word in [*table.COMMANDS, "imagenet256_dit_xl2", "optimizer.lr=", "h100-80gb"])
