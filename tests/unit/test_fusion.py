"""Compiled draws and loss are those of the plain functions, and where they are compiled."""

import warnings

import pytest
import torch
from torch._dynamo.utils import counters

from imm_scale import fusion, rng
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.models.dit import DiT, DiTConfig
from tests.unit.methods.small import imm, losses

# t_min > 0: otherwise t_min + (t_max - t_min) u would be one rounding with or without contraction.
OBJECTIVE = imm(particles=4, t_min=0.006, t_max=0.994, label_drop=0.3)
CLOCK = 2**40 + 2**33  # ordinals of more than 32 bits
SIDE = 8


def _flow_map(seed: int = 0) -> FlowMap:
    torch.manual_seed(seed)
    net = DiT(DiTConfig(32, 1, 2, 2, 4, SIDE, SIDE, num_classes=10))
    net.has_dropout = True  # its keys are drawn; they change nothing
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return FlowMap(net, OTFlowMatching(), null_label=net.null_label)


def _batch(samples: int = 64, clock: int = CLOCK) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = 0.5 * rng.normal(1, "data", torch.arange(samples), (4, SIDE, SIDE))
    return x, torch.arange(samples) % 10, clock + torch.arange(samples)


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def _draws(batch):
    return OBJECTIVE.draw(_flow_map(), *batch, seed=3)


def test_numpy_plain_tensors_and_the_compiled_graph_draw_the_same_bits(monkeypatch):
    """Noise, times, labels and keys at 16,384 normals. A GPU's logarithms and cosines may differ in their last fp64
    bit, which the rounding to fp32 hides but in one of some 10^8 normals; all else is exact there, too."""
    by_numpy = _draws(_batch())
    with fusion.override(True):
        compiled = _draws(_batch())
    monkeypatch.setattr(rng, "_by_numpy", lambda tensor: False)
    plain = _draws(_batch())
    assert by_numpy.given is plain.given is compiled.given is None  # a net that draws samples at once
    for name in set(by_numpy._fields) - {"given"}:
        assert torch.equal(getattr(by_numpy, name), getattr(plain, name)), name
        assert torch.equal(getattr(by_numpy, name), getattr(compiled, name)), name
    assert (by_numpy.label == 10).sum() > 5 and by_numpy.dropout_key is not None


def _loss_and_gradients(flow_map: FlowMap) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss_G = losses(OBJECTIVE, flow_map, *_batch(), seed=3).loss_G
    gradients = torch.autograd.grad(loss_G.mean(), list(flow_map.parameters()))
    return loss_G.detach(), list(gradients)


def test_compiled_loss_and_gradients_are_the_plain_ones():
    plain, plain_gradients = _loss_and_gradients(_flow_map())
    with fusion.override(True):
        compiled, compiled_gradients = _loss_and_gradients(_flow_map())
    # Sums in another order: fp64 in the kernels, whose terms of order 1 cancel to a loss of 1e-3; fp32 around the net.
    torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=0)
    for a, b in zip(compiled_gradients, plain_gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_nothing_is_compiled_anew_for_the_next_step_another_net_or_a_restart():
    with fusion.override(True):
        _loss_and_gradients(_flow_map())
        graphs = counters["stats"]["unique_graphs"]
        for step in range(3):
            flow_map = _flow_map(step)  # as after a rewind
            batch = _batch(clock=CLOCK + 64 * step)
            losses(OBJECTIVE, flow_map, *batch, seed=3).loss_G.mean().backward()
    assert graphs > 0
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"], "every function is one graph"


def test_other_seeds_draw_other_numbers_when_compiled():
    """The key is a constant of the graph: it must not be that of the seed before."""
    with fusion.override(True):
        first, second = (OBJECTIVE.draw(_flow_map(), *_batch(8), seed=seed) for seed in (3, 4))
    assert torch.equal(second.x_t, OBJECTIVE.draw(_flow_map(), *_batch(8), seed=4).x_t)
    assert not torch.equal(first.x_t, second.x_t)


@fusion.fused()
def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def _forbidden(*args, **kwargs):
    raise AssertionError("torch.compile was called")


def test_a_cpu_runs_functions_as_they_are_written(monkeypatch):
    monkeypatch.setattr(torch, "compile", _forbidden)
    assert _double(torch.ones(2)).tolist() == [2.0, 2.0]
    assert _double.__name__ == "_double"


class _OnGpu(torch.Tensor):
    device = torch.device("cuda")  # type: ignore[assignment]


@pytest.mark.parametrize("works", [True, False])
def test_a_gpu_compiles_where_it_can(monkeypatch, works):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: lambda x: seen.append(settings) or function(x))
    monkeypatch.setattr(fusion, "gpu_compiles", lambda: works)
    triple = fusion.fused()(lambda x: 3 * x)
    for _ in range(2):
        triple(torch.ones(2).as_subclass(_OnGpu))
    assert len(seen) == (2 if works else 0)
    # Triton contracts a * b + c to one rounding unless it is told not to.
    assert all(settings["options"]["emulate_precision_casts"] for settings in seen)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("nothing", None),
        ("triton", "triton is not installed"),
        ("capability", "triton does not know Tesla P100"),
        ("compiler", "needs a C compiler, and there is neither"),
    ],
)
def test_what_a_gpu_lacks_is_said_once(monkeypatch, missing, message):
    monkeypatch.setattr(fusion.importlib.util, "find_spec", lambda name: None if missing == "triton" else object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 0) if missing == "capability" else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    monkeypatch.setattr(fusion.shutil, "which", lambda name: None if missing == "compiler" else f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    fusion.gpu_compiles.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            assert [fusion.gpu_compiles() for _ in range(2)] == [message is None] * 2
    finally:
        fusion.gpu_compiles.cache_clear()
    assert [message in str(warning.message) for warning in record] == ([] if message is None else [True])
