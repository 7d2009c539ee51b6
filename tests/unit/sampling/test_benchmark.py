"""What `python -m benchmarks.sampling` measures is what the project measures, on the net it ships."""

import re

import pytest
import torch

from benchmarks import sampling
from tests import ranks


@pytest.fixture(scope="module")
def net():
    return sampling.load()


def test_the_distance_is_that_of_the_evaluate_command(net, digits, tmp_path):
    spec, flow_map = net
    chosen = sampling.plan(spec, 1)
    distance = sampling.frechet(flow_map, spec, chosen, sampling.digits(spec), repeats=2)
    argv = ["evaluate", str(sampling.DEMO_WEIGHTS), f"data.manifest={digits}", "--out", str(tmp_path)]
    code, output = ranks.run(ranks.command_and_output, 1, *argv, "--steps", "1", "--repeats", "2")[0]
    assert code == 0
    mean, std = re.search(r"(\S+) \+- (\S+)  \(2 x 1797 samples\)", output).groups()
    # As printed; what the reference's features are computed from differs in the last bit of an fp32.
    assert (f"{distance.mean:.4f}", f"{distance.std:.4f}") == (mean, std)


def test_the_error_is_that_of_rounding(net):
    spec, flow_map = net
    chosen = sampling.plan(spec, 2)
    exact = sampling.in_fp64(flow_map, spec, chosen)
    assert exact.dtype == torch.float64
    assert next(flow_map.parameters()).dtype == torch.float32, "the net itself stays as it was"
    errors = {
        name: sampling.error_against_fp64(flow_map, spec, sampling.plan(spec, 2, name), exact).mean
        for name in ("fp32", "bf16")
    }
    # A rounding unit, and a hundred of them: what a net of three blocks may make of it in two steps.
    assert 2**-24 < errors["fp32"] < 100 * 2**-24
    assert 2**-9 < errors["bf16"] < 100 * 2**-9


def test_what_a_machine_cannot_do_is_left_out(monkeypatch):
    assert "needs a GPU" in sampling.possible("fp16", False)
    assert "fp32 on a CPU" in sampling.possible("tf32", True)
    assert sampling.possible("bf16", True) == ""
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "C++ compiler" in sampling.possible("bf16", True)
    assert sampling.possible("bf16", False) == ""
