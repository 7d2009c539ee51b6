"""Memory of samples that are drawn block by block: what nets really keep, and what the plan says of it."""

from unittest.mock import patch

import pytest
import torch

from imm_scale import config as configs
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.in_blocks import sampling
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.methods.samplers import Guidance, pushforward
from imm_scale.models.block_causal import BlockCausal
from imm_scale.models.dit import DiT, DiTConfig
from imm_scale.models.token_transformer import TokenArchitecture
from imm_scale.planner import estimate, text
from imm_scale.precision import computing

SAMPLES = 3


def _net(**more):
    torch.manual_seed(0)
    shape = {"width": 16, "depth": 2, "heads": 2, "patch_size": 2, "channels": 1, "height": 8, "image_width": 8}
    return DiT(DiTConfig(**shape, num_classes=4, **more))


def _bytes(cache):
    return sum(part.nbytes for seen in cache.layers for part in seen)


def _peak(net, precision):
    """Most bytes of keys and values at the end of a call: what it kept beside what it made of it."""
    held, plain = [], net.next_block

    def counted(self, x, c_noise, second, label, cache, context=None):
        before = cache.layers
        out = plain(x, c_noise, second, label, cache, context)
        old = [part for seen in before for part in seen]
        new = [part for seen in cache.layers for part in seen]
        held.append(sum({part.data_ptr(): part.nbytes for part in old + new}.values()))
        return out

    flow_map = FlowMap(net, OTFlowMatching(), null_label=net.null_label)
    grids = [torch.linspace(1.0, 0.0, 2, dtype=torch.float64)] * net.config.blocks
    start, label = torch.randn(SAMPLES, 1, 8, 8, dtype=torch.float64), torch.arange(SAMPLES)
    with patch.object(type(net), "next_block", counted), computing(precision, torch.device("cpu")):
        sampling.sample(flow_map, pushforward, start, grids, label, Guidance())
    return max(held)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "more", [{"blocks": 4}, {"blocks": 2}, {"blocks": 4, "qk_norm": True}, {"blocks": 4, "branch": "mlp"}], ids=str
)
def test_the_peak_of_kept_keys_and_values_is_the_closed_form(more, precision):
    net = _net(**more)
    assert isinstance(net, BlockCausal)
    assert _peak(net, precision) == SAMPLES * net.config.kept_elements * {"fp32": 4, "bf16": 2}[precision]


def test_a_causal_net_of_tokens_keeps_room_for_a_sequence_and_a_block():
    net = TokenArchitecture(16, 2, 2, length=12, vocabulary=5, num_classes=1, causal=True, block=3).build()
    kept = [part for one in net.empty_cache(SAMPLES) for part in one]
    assert sum(part.numel() for part in kept) == SAMPLES * net.config.kept_elements


def test_nets_that_draw_a_sample_at_once_keep_nothing():
    assert _net().config.kept_elements == 0
    masked = TokenArchitecture(16, 2, 2, length=12, vocabulary=5, num_classes=1)
    assert masked.kept_elements == 0
    config = configs.load(["configs/imagenet256_dit_xl2.yaml"]).config
    assert estimate.estimate(config, 1, 8, "h100-80gb", None).sampling is None


BLOCKS = ["model.blocks=16", "data.latent_shape=[4,64,64]", "sampling.guidance_scale=1.5", "method.label_drop=0.1"]


@pytest.mark.parametrize(
    ("more", "gib", "verdict"),
    [
        # 64 samples, 28 layers of 1,152 channels, keys and values of 2 x 1,024 - 3 x 64 tokens, fp32, twice.
        ([], 2 * 4 * 64 * 2 * 28 * 1152 * 1856 / 2**30, "DOES NOT FIT"),
        (["sampling.precision=bf16"], 2 * 2 * 64 * 2 * 28 * 1152 * 1856 / 2**30, "fits"),
    ],
)
def test_a_cache_that_does_not_fit_is_said_with_what_would_make_it_smaller(more, gib, verdict):
    config = configs.load(["configs/imagenet256_dit_xl2.yaml"], [*BLOCKS, *more]).config
    planned = estimate.estimate(config, 1, 8, "a100-40gb", None)
    assert planned.sampling is not None and planned.sampling.kept / 2**30 == pytest.approx(gib)
    page = text.render(config, planned, [])
    section = page[page.index("memory of a GPU that samples") :].split("\n\n")[0]
    assert f"{gib:.2f} GiB" in section and section.splitlines()[4].endswith(verdict)
    remedy = "halved by each of: sampling.precision=bf16, sampling.guidance_scale=1"
    assert (remedy in section) == (verdict != "fits")
