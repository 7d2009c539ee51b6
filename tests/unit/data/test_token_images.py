"""Codes of the small autoencoder: which there are, the way there and back, its gradient, its file."""

import hashlib
import math

import numpy as np
import pytest
import torch

from imm_scale.data.manifest import TokenCodec
from imm_scale.data.tokens.images import (
    AUTOENCODER_FILE,
    BINARY_HASH,
    FSQAutoencoder,
    FSQShape,
    binarized,
    bounded,
    from_ids,
    open_decoder,
    read_autoencoder,
    rounded,
    to_ids,
)
from imm_scale.errors import UserError

LEVELS = (8, 5, 5)


@pytest.fixture(scope="module")
def net() -> FSQAutoencoder:
    torch.manual_seed(0)
    return FSQAutoencoder(FSQShape(28, 1, width=8)).eval().requires_grad_(False)


def test_each_channel_has_exactly_its_levels_whatever_comes_in():
    z = torch.cat([torch.linspace(-6, 6, 4001), torch.tensor([-1e4, 1e4])])[:, None, None, None].expand(-1, 3, 1, 1)
    levels = [rounded(bounded(z, LEVELS))[:, i].unique().tolist() for i in range(3)]
    assert levels == [list(range(-4, 4)), list(range(-2, 3)), list(range(-2, 3))]
    # 0 stays 0 for odd and even numbers of levels alike; 1e-6: fp32.
    assert bounded(torch.zeros(1, 3, 1, 1), LEVELS).abs().max() < 1e-6


def test_every_code_has_a_number_of_its_own_and_comes_back():
    ids = torch.arange(200).repeat(8)[None].unflatten(1, (25, 64))[0]
    q = from_ids(ids, LEVELS, 8)
    assert torch.equal(to_ids(q, LEVELS), ids)
    assert len({tuple(code) for code in q.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}) == 200 == math.prod(LEVELS)


def test_rounding_passes_the_gradient_straight_through():
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    (rounded(z) * weight).sum().backward()
    assert torch.equal(z.grad, weight) and torch.equal(rounded(z).detach(), z.detach().round())


@pytest.mark.parametrize(("side", "factor"), [(8, 1), (28, 4), (32, 4), (33, 8)])
def test_images_of_any_side_become_64_codes(side, factor):
    shape = FSQShape(side, 3, width=4)
    images = torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8)
    net = FSQAutoencoder(shape)
    assert shape.factor == factor and net.encode(images).shape == (3, 64)
    decoded = net.decode(net.encode(images))
    assert decoded.shape == images.shape and decoded.dtype == torch.uint8


def test_codes_decode_to_what_the_net_reconstructs(net):
    images = torch.randint(0, 256, (70, 28, 28, 1), dtype=torch.uint8)
    x = images.permute(0, 3, 1, 2) / 127.5 - 1
    expected = (net(x) + 1) * 127.5
    # Half a grey level of rounding, and fp32's 1e-3 of 255.
    assert (net.decode(net.encode(images)).permute(0, 3, 1, 2) - expected.clamp(0, 255)).abs().max() < 0.501


def test_its_file_comes_back_with_equal_bytes_and_others_are_refused(tmp_path, net):
    data = net.to_bytes()
    again = read_autoencoder(data, "here")
    assert again.shape == net.shape and again.to_bytes() == data
    (tmp_path / AUTOENCODER_FILE).write_bytes(data)
    codec = TokenCodec(200, "codes", hashlib.sha256(data).hexdigest(), (28, 28), 6272.0)
    images = open_decoder(codec, str(tmp_path))(torch.zeros(2, 64, dtype=torch.int64))
    assert images.shape == (2, 28, 28, 1)
    for damaged in (b"", data[:-8], data[:40], b"{}" * 20):
        with pytest.raises(UserError, match="elsewhere is no autoencoder of imm-scale pack-tokens"):
            read_autoencoder(damaged, "elsewhere")
    with pytest.raises(UserError, match=r"has sha256 .* the data were packed with abab"):
        open_decoder(TokenCodec(200, "codes", "ab" * 32, (28, 28)), str(tmp_path))
    with pytest.raises(UserError, match="no autoencoder at nowhere"):
        open_decoder(codec, "nowhere")


def test_black_and_white_pixels_come_back():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6)).astype(np.uint8)
    tokens = binarized(images)
    decoded = open_decoder(TokenCodec(2, "binary", BINARY_HASH, (4, 6)), "nowhere")(torch.from_numpy(tokens))
    np.testing.assert_array_equal(decoded[..., 0].numpy() == 255, images >= 128)
    with pytest.raises(UserError, match="stand for a text"):
        open_decoder(TokenCodec(256, "bytes", ""), "nowhere")
