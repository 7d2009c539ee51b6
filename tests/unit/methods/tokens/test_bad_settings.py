"""Mistakes with nets over tokens: each is found before training or before weights are read, with its remedy."""

import pytest

from imm_scale import build
from imm_scale import config as configs
from imm_scale.errors import UserError
from imm_scale.preflight import prepare
from imm_scale.sampling.check import check_before_training
from tests import small_tokens
from tests.conftest import ANY_METHOD

MASKED, NEXT = ["method.name=masked"], ["method.name=next_block", "model.causal=true"]
DIT = ["model.name=dit", "model.patch_size=1"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return small_tokens.binary_digits(tmp_path_factory.mktemp("tokens"), last=128)


def _prepared(manifest, *words):
    argv = [*ANY_METHOD, *small_tokens.NET, f"data.manifest={manifest}", *words]
    return prepare(configs.load([], argv).config, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*MASKED, "model.head.kind=chain"], r"model\.head\.kind=chain draws.*jointly.*method\.steps=\[1,2,4,8\]"),
        ([*MASKED, "method.steps=[1,65]"], r"65 steps for 64 tokens"),
        ([*MASKED, "method.steps=[0]"], r"method\.steps"),
        ([*MASKED, "model.causal=true"], r"method\.name=masked needs a net that sees all.*model\.causal=false"),
        ([*NEXT, "model.causal=false"], r"method\.name=next_block needs.*before each one alone.*model\.causal=true"),
        ([*NEXT, "model.block=65"], r"model\.block=65 is longer than the sequences, of 64 tokens"),
        ([*MASKED, "model.block=2"], r"model\.block=2 is for causal nets"),
        ([*MASKED, "model.head.kind=none"], r"model\.head\.kind"),
        ([*MASKED, "model.head.group=2"], r"model\.head\.group=2.*kind=mixture"),
        ([*MASKED, "data.space.name=latents"], r"tokens.*data\.space\.name"),
        ([*MASKED, "data.space.name=onehot"], r"model\.name=token_transformer works on tokens"),
        ([*MASKED, *DIT], r"model\.name"),
        ([*MASKED, "data.space.name=onehot", *DIT], r"method\.name=masked draws tokens: it needs data\.space"),
        (["method.name=imm"], r"is told no times: use method\.name=masked or next_block"),
        (["method.name=flow_matching", "method.flow_map.second_time=none"], r"sample space|sigma_data"),
        (["method.name=imm", *DIT], r"data\.space\.name"),
        (["method.name=imm", "data.space.name=onehot", "model.name=dit", "model.patch_size=2"], r"model\.patch_size=2"),
        ([*MASKED, "data.vocabulary=3"], r"vocabulary.*2.*3|vocabulary.*3.*2"),
        ([*MASKED, "data.latent_shape=[32]"], r"\(64,\).*\(32,\)"),
    ],
)
def test_a_run_that_cannot_start(words, said, tokens):
    with pytest.raises(UserError, match=said):
        _prepared(tokens, *words)


def test_latents_are_no_tokens(digits):
    for words in (MASKED, NEXT, [*MASKED, "data.space.name=bits", *DIT]):
        with pytest.raises(UserError, match=r"data\.space\.name=tokens, onehot and bits are for tokens.*pixels"):
            _prepared(digits, *words)
    with pytest.raises(UserError, match=r"method\.name=masked draws tokens|works on tokens"):
        _prepared(digits, *MASKED, "data.space.name=latents")
    with pytest.raises(UserError, match=r"method\.name=masked draws tokens"):
        _prepared(digits, *MASKED, "data.space.name=latents", "model.name=dit")


@pytest.mark.parametrize(
    ("words", "steps", "scale", "said"),
    [
        (MASKED, 65, 1.0, r"65 steps for 64 tokens"),
        (MASKED, 4, 2.0, r"guidance_scale=2\.0 is for flow maps.*use 1"),
        ([*MASKED, "sampling.sampler=verified"], 4, 1.0, r"sampling\.sampler=verified.*method\.name=masked.*unmask"),
        ([*MASKED, "sampling.sampler=pushforward"], 4, 1.0, r"sampling\.sampler=pushforward.*unmask"),
        ([*MASKED, "sampling.grid='1,3,12'"], 3, 1.0, r"draw 16 tokens, where 3 steps have to draw 64"),
        ([*MASKED, "sampling.grid='32,32'"], 4, 1.0, r"2 steps that draw 64 tokens, where 4 steps"),
        ([*MASKED, "sampling.grid=eta_1.4"], 4, 1.0, r"grid='eta_1\.4' is unknown for tokens"),
        ([*NEXT, "sampling.sampler=unmask"], 64, 1.0, r"sampling\.sampler=unmask.*blocks, verified"),
        ([*NEXT, "sampling.grid=cosine"], 64, 1.0, r"grid='cosine'.*auto or uniform"),
        ([*NEXT, "model.block=4"], 8, 1.0, r"8 steps.*64 tokens in blocks of model\.block=4; use 16"),
        ([*NEXT, "model.block=3"], 21, 1.0, r"21 steps.*use 22"),
        (NEXT, 64, 1.5, r"guidance_scale=1\.5 is for flow maps"),
    ],
)
def test_samples_that_cannot_be_drawn(words, steps, scale, said, tokens):
    with pytest.raises(UserError, match=said):
        prepared = _prepared(tokens, *words)
        check_before_training(prepared.spec, prepared.config.sampling, [scale], [steps], [])


def test_an_order_of_a_net_that_has_its_own_is_refused(tokens):
    prepared = _prepared(tokens, *NEXT, "sampling.order=confidence")
    with pytest.raises(UserError, match=r"sampling\.order=confidence does nothing here"):
        check_before_training(prepared.spec, prepared.config.sampling, [1.0], [64], ["sampling.order"])


def test_what_fits_starts(tokens):
    for words, steps in (
        ([*MASKED, "method.steps=[1,64]", "model.head.kind=mixture", "model.head.components=2"], [1, 7, 64]),
        ([*NEXT, "model.block=4"], [16]),
        ([*NEXT, "model.block=3"], [22]),
        (["method.name=imm", "data.space.name=bits", *DIT], [1, 2]),
    ):
        prepared = _prepared(tokens, *words)
        check_before_training(prepared.spec, prepared.config.sampling, [1.0], steps, [])
        assert build.method(prepared.spec).group_size == (4 if "method.name=imm" in words else 1)
