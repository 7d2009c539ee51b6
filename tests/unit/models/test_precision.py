"""The net must tell t from r(s, t), in any precision it runs in."""

import pytest
import torch

from imm_scale.methods import imm_times
from imm_scale.methods.imm import ImmConfig
from imm_scale.methods.probability_path import OTFlowMatching, VPCosine
from imm_scale.models.layers import TimeEmbedder

INTERPOLANTS = [OTFlowMatching(), VPCosine()]


def _times(interp, k: int, min_gap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Times over the whole range with t - s >= gap for s = 0, and their r."""
    t = torch.linspace(max(min_gap, 1e-4), imm_times.T_MAX[interp.name], 4001, dtype=torch.float64)
    return t, imm_times.map_r(interp, torch.zeros_like(t), t, k, min_gap)


def _embedder() -> TimeEmbedder:
    torch.manual_seed(0)
    embedder = TimeEmbedder(64, "positional")
    for layer in (embedder.mlp[0], embedder.mlp[2]):
        torch.nn.init.normal_(layer.weight, std=0.02)  # as the DiT starts
    return embedder


@pytest.mark.parametrize("interp", INTERPOLANTS, ids=lambda interp: interp.name)
@pytest.mark.parametrize(("precision", "k"), [("fp32", 12), ("fp32", 15), ("bf16", 12), ("bf16", 15), ("fp16", 12)])
def test_embeddings_of_t_and_r_differ_over_the_whole_range(interp, precision, k):
    t, r = _times(interp, k, imm_times.default_min_gap(precision))
    embedder = _embedder()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        at_t, at_r = embedder(1000 * t), embedder(1000 * r)
    assert at_t.dtype == torch.float32
    assert (at_t != at_r).any(dim=1).all(), t[(at_t == at_r).all(dim=1)]


@pytest.mark.parametrize(("dtype", "first"), [(torch.bfloat16, 0.69), (torch.float16, 0.89)])
def test_rounding_the_times_to_the_networks_precision_would_merge_them(dtype, first):
    t, r = _times(OTFlowMatching(), 12, 0.0)
    merged = (1000 * t).to(dtype) == (1000 * r).to(dtype)
    # Rounding to a grid merges some pairs; from this time on the step is below half its spacing for most of them.
    assert merged[t > first + 0.01].double().mean() > 0.5
    assert t[merged].min() > first - 0.2
    gapped = imm_times.map_r(OTFlowMatching(), torch.zeros_like(t), t, 12, 1e-4)
    assert ((1000 * t).to(dtype) == (1000 * gapped).to(dtype)).any(), "the gap alone does not help"


@pytest.mark.parametrize(("precision", "gap"), [("fp32", 0.0), ("tf32", 0.0), ("bf16", 1e-4), ("fp16", 1e-4)])
def test_the_default_gap_follows_the_precision(precision, gap):
    assert ImmConfig().resolved(precision).min_gap == gap
    assert ImmConfig(min_gap=0.5).resolved(precision).min_gap == 0.5
