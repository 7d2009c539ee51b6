"""Latents under another normalization than the one measured on the data."""

import pytest
import torch

from imm_scale.data.manifest import Codec, Manifest
from imm_scale.data.spaces import Latents, LatentsConfig
from imm_scale.errors import UserError

CODEC = Codec("pixels", "", 2, 2, 1, (0.1, 0.2), (0.5, 0.25))
MANIFEST = Manifest(CODEC, (2, 2, 2), 3, (), ())


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        (None, None, [0.5 * 0.9 / 0.5, 0.5 * 0.8 / 0.25]),
        ([0.0, 0.5], None, [0.5 * 1.0 / 0.5, 0.5 * 0.5 / 0.25]),
        (None, [1.0, 2.0], [0.5 * 0.9, 0.5 * 0.8 / 2]),
        ([0.0, 0.0], [2.0, 4.0], [0.25, 0.125]),
    ],
)
def test_samples_are_what_is_stored_minus_mean_over_std_times_sigma_data(mean, std, expected):
    space = Latents.of(LatentsConfig(mean=mean, std=std), MANIFEST)
    z = space.from_stored(torch.ones(1, 2, 2, 2), 0, "x", torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(z[0, :, 0, 0], torch.tensor(expected), rtol=1e-6, atol=0)  # fp32
    assert space.artifacts(None, torch.device("cpu"))(z).eq(255).all(), "white comes back as white"


def test_a_number_for_each_channel_is_wanted():
    with pytest.raises(UserError, match=r"data\.space\.std=\[1\.0\] has 1 numbers for 2 channels"):
        Latents.of(LatentsConfig(std=[1.0]), MANIFEST)
