"""The counter-based generator against the Random123 definition, and the independence the clock relies on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imm_scale import rng

properties = settings(max_examples=60, deadline=None)
words = st.integers(0, 2**32 - 1)
ordinals = st.integers(0, 2**63 - 1)

# Salmon et al., Random123's kat_vectors, philox4x32 with 10 rounds: (counter, key, result).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_reference(counter, key):
    """Philox4x32-10 in Python's unbounded integers, as in the paper's figure."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * x0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = hi1 ^ x1 ^ k0, lo1, hi0 ^ x3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def philox(counter, key):
    return tuple(int(word) for word in rng.philox4x32(tuple(torch.tensor(word) for word in counter), key))


def kolmogorov_smirnov(sample, cdf):
    """Largest distance of the empirical from the true distribution function."""
    values = np.sort(np.asarray(sample, dtype=np.float64))
    n, truth = len(values), cdf(values)
    return max((np.arange(1, n + 1) / n - truth).max(), (truth - np.arange(n) / n).max())


def normal_cdf(x):
    return np.array([0.5 * math.erfc(-v / math.sqrt(2.0)) for v in x])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_known_answers(counter, key, expected):
    assert philox(counter, key) == expected


@properties
@given(counter=st.tuples(words, words, words, words), key=st.tuples(words, words))
def test_philox_agrees_with_unbounded_integers(counter, key):
    assert philox(counter, key) == philox_reference(counter, key)


def test_every_device_has_the_same_words():
    counter = torch.randint(0, 2**32, (4, 20_001), generator=torch.Generator().manual_seed(0))
    for key in ((0, 0), (0xFFFFFFFF, 0x9E3779B9)):
        on_cpu = rng.philox4x32(tuple(counter), key)
        assert torch.equal(torch.stack(on_cpu), torch.stack(rng._philox_on_tensors(tuple(counter), key)))


def test_philox_broadcasts_its_counter_words():
    columns = torch.arange(3)
    zero = torch.tensor(0)
    broadcast = torch.stack(rng.philox4x32((columns, zero, zero, zero), (7, 8)), dim=-1)
    assert broadcast.tolist() == [list(philox_reference((i, 0, 0, 0), (7, 8))) for i in range(3)]


@properties
@given(batch=st.lists(ordinals, min_size=1, max_size=9), data=st.data())
def test_a_row_depends_on_its_ordinal_and_not_on_the_batch_around_it(batch, data):
    order = data.draw(st.permutations(range(len(batch))))
    shuffled = torch.tensor([batch[i] for i in order])
    draws = {
        "uniform": lambda n: rng.uniform(3, "times", n, 5),
        "normal": lambda n: rng.normal(3, "noise", n, (2, 3)),
        "random_bits": lambda n: rng.random_bits(3, "dropout", n),
    }
    for name, draw in draws.items():
        together = draw(shuffled)
        for row, i in enumerate(order):
            assert torch.equal(together[row], draw(torch.tensor([batch[i]]))[0]), name


@pytest.mark.parametrize("far", [2**32, 2**33 + 2**32, 2**45, 2**62])
def test_ordinals_beyond_32_bits_do_not_wrap(far):
    near_and_far = torch.tensor([5, 5 + far, far])
    assert len(set(rng.random_bits(0, "noise", near_and_far).tolist())) == 3
    assert len(set(rng.uniform(0, "noise", near_and_far)[:, 0].tolist())) == 3
    normals = rng.normal(0, "noise", near_and_far, (64,))
    # Independent rows of 64 agree in no element; a wrapped counter would repeat the row.
    assert not (normals[0] == normals[1]).any()
    assert not (normals[0] == normals[2]).any()


def test_seed_purpose_and_stream_each_change_every_draw():
    ordinal = torch.arange(256)
    base = rng.uniform(1, "noise", ordinal, 4)
    others = [
        rng.uniform(2, "noise", ordinal, 4),
        rng.uniform(1, "times", ordinal, 4),
        rng.uniform(1, "noise", ordinal, 4, stream=1),
        rng.uniform(1, "noise", ordinal, 4, stream=2**32 - 1),
        rng.uniform(1 + 2**32, "noise", ordinal, 4),
    ]
    for other in others:
        assert not (base == other).any()
        # 1024 pairs of independent uniforms: correlation within 4.5 / sqrt(1024).
        assert abs(np.corrcoef(base.flatten(), other.flatten())[0, 1]) < 4.5 / 32


@pytest.mark.parametrize("stream", [-1, 2**32])
def test_a_stream_of_more_than_32_bits_is_refused(stream):
    with pytest.raises(ValueError, match=str(stream)):
        rng.uniform(0, "noise", torch.arange(2), stream=stream)


def test_draws_are_deterministic_and_leave_torch_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = rng.normal(5, "noise", torch.arange(10), (7,))
    torch.manual_seed(1)
    second = rng.normal(5, "noise", torch.arange(10), (7,))
    assert torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())


def test_keys_are_two_32_bit_words_and_differ_between_purposes():
    keys = {rng.derive_key(seed, purpose) for seed in range(50) for purpose in ("noise", "times", "label_drop", "1/x")}
    assert len(keys) == 200
    assert all(0 <= word < 2**32 for key in keys for word in key)


def test_shapes_and_dtypes():
    ordinal = torch.arange(3)
    assert rng.uniform(0, "times", ordinal).shape == (3, 1)
    for count in (1, 2, 3, 4, 5):
        drawn = rng.uniform(0, "times", ordinal, count)
        assert (drawn.shape, drawn.dtype) == ((3, count), torch.float64)
    for shape in ((), (1,), (3,), (2, 3), (4, 2, 2)):
        drawn = rng.normal(0, "noise", ordinal, shape)
        assert (drawn.shape, drawn.dtype) == ((3, *shape), torch.float32)
    assert rng.random_bits(0, "dropout", ordinal).dtype == torch.int64


N = 100_000
# Each bound below is 4.5 standard errors (one in 150,000), at fixed seeds.
SIGMAS = 4.5


def test_uniforms_are_uniform_with_53_bits():
    sample = rng.uniform(11, "times", torch.arange(N // 2), 2)
    flat = sample.flatten().numpy()
    assert flat.min() >= 0.0
    assert flat.max() < 1.0
    assert abs(flat.mean() - 1 / 2) < SIGMAS * math.sqrt(1 / 12 / N)
    assert abs(flat.var() - 1 / 12) < SIGMAS * math.sqrt(1 / 180 / N)
    # The Kolmogorov quantile at p = 1e-3 is 1.95 / sqrt(n).
    assert kolmogorov_smirnov(flat, lambda x: x) < 1.95 / math.sqrt(N)
    scaled = flat * 2.0**53
    assert (scaled == np.floor(scaled)).all()
    lowest_bit = np.mod(scaled, 2.0)
    assert abs(lowest_bit.mean() - 0.5) < SIGMAS * 0.5 / math.sqrt(N)


def test_normals_are_normal():
    sample = rng.normal(12, "noise", torch.arange(N // 8), (8,)).double().flatten().numpy()
    assert abs(sample.mean()) < SIGMAS / math.sqrt(N)
    assert abs(sample.var() - 1) < SIGMAS * math.sqrt(2 / N)
    assert abs((sample**3).mean()) < SIGMAS * math.sqrt(15 / N)
    assert abs((sample**4).mean() - 3) < SIGMAS * math.sqrt(96 / N)
    assert np.abs(sample).max() < 6.77
    assert kolmogorov_smirnov(sample, normal_cdf) < 1.95 / math.sqrt(N)


def test_elements_of_a_row_and_neighbouring_rows_are_uncorrelated():
    n = N // 8
    for sample in (
        rng.normal(13, "noise", torch.arange(n), (8,)).double().numpy(),
        rng.uniform(13, "noise", torch.arange(n), 8).numpy() - 0.5,
    ):
        bound = SIGMAS / math.sqrt(n)
        for values in (sample, sample**2):  # squares: the two of a Box-Muller pair share a radius, and must not show it
            within = np.corrcoef(values.T) - np.eye(8)
            assert np.abs(within).max() < bound
            between = np.corrcoef(values[1:].T, values[:-1].T)[:8, 8:]
            assert np.abs(between).max() < bound


def test_random_bits_fill_63_bits_evenly_and_never_turn_negative():
    bits = rng.random_bits(14, "dropout", torch.arange(20_000))
    assert (bits >= 0).all()
    assert len(set(bits.tolist())) == 20_000
    for position in range(63):
        share = ((bits >> position) & 1).double().mean().item()
        assert abs(share - 0.5) < SIGMAS * 0.5 / math.sqrt(20_000), position


def test_draws_never_change_between_versions():
    """A resumed run must go on with the noise it began with: these numbers are part of the checkpoint format."""
    ordinal = torch.tensor([0, 2**40 + 1])
    uniform = rng.uniform(0, "times", ordinal, 2)
    counters = [[(0, 0, o % 2**32, o >> 32)] for o in ordinal.tolist()]
    key = (0x76C323CE, 0x37010C46)  # the blake2b hash of "0/times"
    assert rng.derive_key(0, "times") == key
    for row, blocks in enumerate(counters):
        w = [word for block in blocks for word in philox_reference(block, key)]
        expected = [((w[2 * i] >> 5) * 2**26 + (w[2 * i + 1] >> 6)) / 2**53 for i in range(2)]
        assert uniform[row].tolist() == expected


@pytest.mark.parametrize("low_word", [5, 2**31 + 5])
def test_compiled_draws_are_the_plain_ones_whatever_the_counters(low_word):
    # Block numbers of 3 and more times a multiplier leave int32, and words of 2^31 and more leave int64.
    ordinal = torch.arange(4) + (3 << 32) + low_word
    compiled = torch.compile(rng.uniform, dynamic=False)
    assert torch.equal(compiled(7, "dropout_mask", ordinal, 41), rng.uniform(7, "dropout_mask", ordinal, 41))
