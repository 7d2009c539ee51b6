"""Sums of gradients in 16 bits, where the answer is known."""

import pytest
import torch

from benchmarks.reduction import WORLDS, relative_error, ring_sum


@pytest.mark.parametrize(
    ("world_size", "dtype", "mean"),
    [
        (64, torch.bfloat16, 1.0),
        # bf16 has 8 bits: at a half one more 512th is a tie and rounds down, for ever.
        (512, torch.bfloat16, 0.5),
        # So has fp16 11: 2,048 512ths are 4.
        (512, torch.float16, 1.0),
        (4096, torch.float16, 0.5),
        (4096, torch.float32, 1.0),
    ],
)
def test_equal_gradients_stop_adding_up_where_one_is_half_a_unit_of_the_last_bit(world_size, dtype, mean):
    addends = torch.full((world_size, 1), 1.0 / world_size)
    assert float(ring_sum(addends, dtype)) == mean


def test_the_error_grows_with_the_ranks_in_16_bits_and_hardly_in_32():
    bf16, fp16, fp32 = (
        [relative_error(world_size, dtype) for world_size in WORLDS]
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    )
    # An addition rounds a partial sum to half a unit of the last bit at most: 2^-9 in bf16, uniformly spread, so its
    # error is that over the root of 3; partial sums grow to the sum itself, hence another root of 3.
    assert bf16[-1] > 2**-9 / 3 * 512**0.5 / 2 and sorted(bf16) == bf16
    assert all(2**-3.5 < b / a < 2**-2 for a, b in zip(bf16, fp16, strict=True)), "three bits more"
    assert max(fp32) < 1e-7
