"""Tokens as they are, as one-hot vectors and as bits: deviation, the way back, and the unchanged flow map."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from imm_scale.data.manifest import Manifest, TokenCodec
from imm_scale.data.tokens.spaces import Bits, BitsConfig, OneHot, OneHotConfig, Tokens, TokensConfig
from imm_scale.errors import UserError
from tests import ranks, small_tokens
from tests.conftest import TINY, losses

T = 6
VIEWS = {"onehot": (OneHot, OneHotConfig), "bits": (Bits, BitsConfig)}


def _manifest(vocabulary):
    return Manifest(TokenCodec(vocabulary, "bytes", "0" * 64), (T,), 3, (), ())


def _space(name, vocabulary, **config):
    kind, keys = VIEWS[name]
    return kind.of(keys(**config), _manifest(vocabulary))


def _stored(vocabulary, samples=4):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (samples, T), generator=generator)
    ids[0, :2] = torch.tensor([0, vocabulary - 1])
    return torch.from_numpy(ids.numpy().astype(TokenCodec(vocabulary, "bytes", "").stored_dtype)), ids


def _real(space, stored):
    return space.from_stored(stored, 0, "posterior", torch.arange(len(stored)))


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("vocabulary", [2, 3, 27, 256])
def test_equally_likely_ids_have_the_deviation_of_the_prior(name, vocabulary):
    """sum over ids and channels of x^2 / (K C); bits of a vocabulary between powers of two have a mean, and x^2 = 1."""
    space = _space(name, vocabulary, sigma_data=0.7)
    every = torch.arange(vocabulary)[:, None].expand(-1, T)
    x = _real(space, every).double()
    assert x.shape == (vocabulary, *space.shape) and space.shape == (space.channels, 1, T)
    # fp32 values of order 1, K of them.
    assert x.square().mean().sqrt().item() == pytest.approx(0.7, rel=1e-6)
    if name == "onehot" or vocabulary & (vocabulary - 1) == 0:
        assert x.mean(dim=0).abs().max().item() < 1e-6
    assert space.channels == (vocabulary if name == "onehot" else (vocabulary - 1).bit_length())
    prior = space.prior(0, "sample", torch.arange(2000))
    # 2000 C T normals, 12,000 at least: 4 standard errors of their deviation.
    assert prior.dtype == torch.float32 and prior.std().item() == pytest.approx(0.7, rel=0.03)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("vocabulary", [2, 5, 256])
def test_ids_come_back_whatever_is_added_within_half_a_step(name, vocabulary):
    space, (stored, ids) = _space(name, vocabulary), _stored(vocabulary)
    x = _real(space, stored)
    assert torch.equal(space.tokens(x), ids)
    out = torch.empty_like(x)
    assert space.from_stored(stored, 0, "posterior", torch.arange(4), out=out) is out and torch.equal(out, x)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    assert torch.equal(space.tokens(x + 0.9 * noise), ids), "distances are sigma_data 0.5 at least, either way"


def test_one_hot_in_numbers():
    """K = 4, sigma_d = .5: c = 2 / sqrt(3), c (1 - 1/4) = .866 and -c / 4 = -.289."""
    x = _real(_space("onehot", 4), torch.tensor([[2, 0, 0, 0, 0, 3]]))
    assert x[0, :, 0, 0].tolist() == pytest.approx([-0.288675, -0.288675, 0.866025, -0.288675], abs=1e-6)


def test_bits_in_numbers():
    """Lowest first: 6 is 0, 1, 1. Above the vocabulary there is its last id alone."""
    space = _space("bits", 6)
    assert _real(space, torch.full((1, T), 5))[0, :, 0, 0].tolist() == [0.5, -0.5, 0.5]
    assert space.tokens(torch.full((1, 3, 1, T), 0.5))[0].tolist() == [5] * T  # 7 is no id


def test_long_vectors_are_refused():
    with pytest.raises(UserError, match=r"onehot is for up to 256.*have 257: use data\.space\.name=bits"):
        _space("onehot", 257)
    assert _space("bits", 257).channels == 9


@pytest.mark.parametrize("vocabulary", [2, 300, 70_000])
def test_tokens_are_what_is_stored(vocabulary):
    space, (stored, ids) = Tokens.of(TokensConfig(), _manifest(vocabulary)), _stored(vocabulary)
    assert space.shape == (T,) and space.vocabulary == vocabulary
    x = _real(space, stored)
    assert x.dtype == torch.int64 and torch.equal(x, ids) and torch.equal(space.tokens(x), ids)
    out = torch.empty_like(x)
    assert space.from_stored(stored, 0, "posterior", torch.arange(4), out=out) is out and torch.equal(out, ids)
    prior = space.prior(0, "sample", torch.arange(2))
    assert prior.dtype == torch.int64 and torch.equal(prior, torch.full((2, T), vocabulary))


@pytest.mark.parametrize("kind", [Tokens, OneHot, Bits])
def test_a_space_comes_back_from_json(kind):
    config = {Tokens: TokensConfig, OneHot: OneHotConfig, Bits: BitsConfig}[kind]()
    space = kind.of(config, _manifest(17))
    assert kind.from_fields(json.loads(json.dumps(space.to_fields()))) == space


@pytest.mark.parametrize("name", VIEWS)
def test_imm_trains_on_a_view_and_samples_are_ids(name, tmp_path):
    manifest = small_tokens.binary_digits(tmp_path / "data", last=256)
    argv = [*TINY, f"data.space.name={name}", "model.name=dit", "model.patch_size=1", f"data.manifest={manifest}"]
    ranks.train(1, *argv, "train.max_steps=2", f"run.dir={tmp_path}/run")
    assert np.isfinite(losses(tmp_path / "run")).all()
    assert ranks.command("sample", f"{tmp_path}/run", "--steps", "1,2", "--num", "8", "--format", "jsonl") == 0
    files = list(Path(tmp_path / "run").rglob("*.jsonl"))
    rows = [json.loads(line) for file in files if "samples" in str(file) for line in file.read_text().splitlines()]
    assert len(rows) == 16 and all(len(row["tokens"]) == 64 and set(row["tokens"]) <= {0, 1} for row in rows)
