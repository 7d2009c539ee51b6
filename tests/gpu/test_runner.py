"""The GPU benchmark's sections are each a process of their own: whatever becomes of one, the others run."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import machine, runner, table
from benchmarks.gpu.report import Context
from benchmarks.gpu.sections import SECTIONS, Section

_MODULES = {
    "gpu_good": """
def run(context, report):
    report.figure("size", context.size)
    report.check("small enough", 0.5, at_most=1.0)
    report.goal("fast enough", 0.5, at_least=1.0)
    report.skip("tf32", "not here")
""",
    "gpu_failing": """
def run(context, report):
    report.check("small enough", float("nan"), at_most=1.0)
    report.figure("after it", 1)
""",
    "gpu_hanging": """
import subprocess, time
def run(context, report):
    report.figure("child", subprocess.Popen(["sleep", "1000"]).pid)
    time.sleep(1000)
""",
    "gpu_crashing": """
def run(context, report):
    report.figure("before it", 1)
    raise ValueError("seven is no even number")
""",
    "gpu_dying": """
import os, signal
def run(context, report):
    os.kill(os.getpid(), signal.SIGSEGV)
""",
    "gpu_missing_import": "import a_package_that_is_nowhere",
}
_LIMIT = 5  # seconds: of the hanging section, and more than the others take on a busy machine to be forked


@pytest.fixture
def sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Section]:
    """A section of each kind, and a good one last."""
    for name, text in _MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    names = [*list(_MODULES)[1:], "gpu_good"]
    return [Section(name.removeprefix("gpu_"), 60, "a test", module=name) for name in names]


def _context(tmp_path: Path, size: str = "small") -> Context:
    return Context(size, torch.device("cpu"), tmp_path / "out")  # type: ignore[arg-type]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_section_that_fails_hangs_or_crashes_is_recorded_and_the_next_one_runs(sections, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_SMALL_LIMIT", _LIMIT)
    results = runner.run(sections, _context(tmp_path))
    outcomes = {result.section: result.outcome for result in results}
    assert outcomes == {
        "failing": "failed",
        "hanging": "over its limit",
        "crashing": "crashed",
        "dying": "crashed",
        "missing_import": "crashed",
        "good": "done",
    }
    by_section = {result.section: result for result in results}
    assert [entry.passed for entry in by_section["failing"].entries] == [False, None], "it goes on after a failed check"
    assert by_section["hanging"].why == f"over its limit of {_LIMIT} s"
    assert by_section["hanging"].seconds == pytest.approx(_LIMIT, abs=2)
    assert "gpu_hanging.py" in (tmp_path / "out" / "hanging.log").read_text(), "its log says where it stood"
    assert by_section["crashing"].why.startswith("exit code 1\n")
    assert "seven is no even number" in by_section["crashing"].why
    assert [entry.name for entry in by_section["crashing"].entries] == ["before it"]
    assert by_section["dying"].why.startswith("ended by signal 11\n")
    assert "a_package_that_is_nowhere" in by_section["missing_import"].why
    assert not runner.succeeded(results) and runner.succeeded(results[-1:])


def test_what_a_section_over_its_limit_had_started_ends_with_it(sections, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_SMALL_LIMIT", 2)
    (result,) = runner.run([section for section in sections if section.name == "hanging"], _context(tmp_path))
    (child,) = [entry.value for entry in result.entries]
    assert isinstance(child, int)
    time.sleep(0.5)
    assert not _is_alive(child)


def test_tables_and_files_say_what_became_of_each(sections, tmp_path):
    chosen = [section for section in sections if section.name in ("failing", "crashing", "good")]
    results = runner.run(chosen, _context(tmp_path))
    text = table.text(results)
    assert "3 sections in" in text
    assert "1 checks hold, 1 fail" in text and "0 goals met, 1 missed" in text and "1 entries skipped" in text
    assert "crashing crashed: exit code 1" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["failing", "small", "enough", "nan", "<=", "1", "FAILS"] in rows
    assert ["good", "tf32", "not", "here", "skipped"] in rows
    out = tmp_path / "out"
    page = table.markdown(results, out)
    assert "| good | small enough | 0.5 | <= 1 | holds |" in page
    on = json.loads((out / machine.NAME).read_text())
    assert on["torch"] == torch.__version__.partition("+")[0] or on["torch"] == torch.__version__
    assert on["date"] in page
    assert [record["outcome"] for record in json.loads((out / "results.json").read_text())] == [
        "crashed" if section.name == "crashing" else "failed" if section.name == "failing" else "done"
        for section in chosen
    ]


def test_an_earlier_commands_files_are_not_taken_for_this_ones(sections, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "dying.json").write_text('[{"kind": "figure", "name": "old", "value": 1}]')
    (result,) = runner.run([section for section in sections if section.name == "dying"], _context(tmp_path))
    assert result.entries == []


def test_sections_of_full_size_have_an_interpreter_of_their_own(sections, tmp_path):
    (result,) = runner.run([section for section in sections if section.name == "good"], _context(tmp_path, "full"))
    assert (result.outcome, result.entries[0].value) == ("done", "full"), result.why


def test_a_section_without_the_memory_it_needs_is_skipped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 << 30, 80 << 30))
    context = Context("full", torch.device("cuda"), Path())
    assert runner._missing_memory(Section("", 1, "", memory=20), context) == ""
    assert "needs 21 GiB of GPU memory, 20.0 are free" in runner._missing_memory(Section("", 1, "", memory=21), context)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_a_line_and_ends_with_2(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and "no CUDA device" in stderr and "--size small" in stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command.main(["--size", "small", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_an_unknown_section_is_the_users_mistake(capsys):
    with pytest.raises(SystemExit) as raised:
        command.main(["--only", "draws,drawz"])
    assert raised.value.code == 2
    assert "drawz" in capsys.readouterr().err


def test_one_word_names_all_sections_of_a_kind():
    chosen = command._parse(["--only", "timings,draws"]).sections
    assert [section.name for section in chosen] == ["draws", *(section.name for section in SECTIONS[12:])]


@pytest.mark.parametrize("slack", ["0.5", "nan", "1e9", "abc"])
def test_less_time_than_the_limits_is_the_users_mistake(slack, capsys):
    with pytest.raises(SystemExit) as raised:
        command.main(["--slack", slack])
    assert raised.value.code == 2
    assert slack in capsys.readouterr().err


def test_proofs_come_first(capsys):
    assert command.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [section.name for section in SECTIONS]
    proofs = (
        "versions",
        "draws",
        "loss",
        "conditioning",
        "branches",
        "tangent",
        "heads",
        "streams",
        "stages",
        "overflow",
        "memory",
        "train",
    )
    assert tuple(names[: len(proofs)]) == proofs
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("names", [[], ["loss"], ["train,draws", "loss"]])
def test_only_chooses_in_the_order_they_run(names):
    chosen = command._parse([word for name in names for word in ("--only", name)]).sections
    only = {one for name in names for one in name.split(",")}
    assert [section.name for section in chosen] == [
        section.name for section in SECTIONS if not only or section.name in only
    ]
