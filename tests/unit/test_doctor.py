"""The doctor's verdicts, alone and among ranks."""

import os

import pytest

from imm_scale import doctor
from imm_scale.parallel import network, world
from imm_scale.parallel.world import World
from tests import ranks


def test_a_folder_that_can_be_written_to_is_fine_and_left_as_it_was(tmp_path):
    findings = doctor.check_folder(str(tmp_path / "runs"), "run folder")
    assert [finding.name for finding in findings] == ["run folder", "clock", "disk"]
    assert [finding.verdict for finding in findings[:2]] == ["OK", "OK"]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("folder", ["/proc/nothing", "nosuch://bucket/x"])
def test_a_folder_that_cannot_be_written_to_fails_with_what_to_do(folder):
    (finding,) = doctor.check_folder(folder, "run folder")
    assert finding.verdict == "FAIL"
    assert "make it writable" in str(finding)


def test_limits_are_judged(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda kind: (1024, 4096))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    findings = {finding.name: finding for finding in doctor.check_limits()}
    assert findings["open files"].verdict == "WARN"
    assert "ulimit -n 4096" in str(findings["open files"])
    assert findings["threads"].verdict == "WARN"


def test_gpus_that_torch_cannot_use_fail(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    verdicts = {finding.name: finding.verdict for finding in doctor.check_software()}
    assert verdicts["CUDA"] == "FAIL"
    assert verdicts["compiler"] == "WARN"


def test_ranks_see_each_other_and_the_folder(tmp_path):
    (code, output), (code_1, output_1) = ranks.run(ranks.command_and_output, 2, "doctor", "--dir", str(tmp_path))
    assert code == code_1 == 0, output + output_1
    assert "OK    all-reduce     2 ranks in" in output
    assert "OK    gloo           2 ranks over the address of this machine's name in" in output
    assert "OK    shared folder  2 of 2 ranks' files seen" in output
    assert list(tmp_path.iterdir()) == []


def _on_its_own_folder(base: str) -> list[str]:
    """A folder for each rank, as on nodes that share nothing."""
    rank = int(os.environ["RANK"])
    folder = os.path.join(base, str(rank))
    os.makedirs(folder)
    return [str(finding) for finding in doctor.check_ranks(World(rank, 2, rank), folder)]


def test_a_folder_that_is_not_shared_fails(tmp_path):
    for lines in ranks.run(_on_its_own_folder, 2, str(tmp_path)):
        assert any(line.startswith("FAIL  shared folder  1 of 2") for line in lines)


def test_the_command_alone_tries_two_local_ranks_and_says_what_failed():
    ((code, output),) = ranks.run(ranks.command_and_output, 1, "doctor", "--dir", "/proc/nothing")
    assert code == 1
    assert "FAIL  run folder     /proc/nothing" in output
    assert "OK    all-reduce     2 ranks in" in output


def _with_gloo_over(interface: str) -> list[str]:
    """A main group that works, and gloo beside it over an interface that is not there, as NCCL's ^lo would be taken."""
    rank = int(os.environ["RANK"])
    world.init(World(rank, 2, rank))
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    return [str(doctor._gloo(World(rank, 2, rank)))]


def test_gloo_over_an_interface_that_is_not_there_fails_on_every_rank_with_what_to_do():
    for (line,) in ranks.run(_with_gloo_over, 2, "^lo,docker0"):
        assert line.startswith("FAIL  gloo           2 ranks over ^lo,docker0: ")
        assert "(rank 0)" in line and "(rank 1)" in line
        assert "GLOO_SOCKET_IFNAME=NAME" in line and network.describe() in line
