"""The grouped MMD (bracket of eq 67 over M^2) against naive double loops."""

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imm_scale.errors import UserError
from imm_scale.methods.mmd import grouped_mmd

mp.mp.dps = 60  # one number in all tests: it is global
properties = settings(max_examples=40, deadline=None)
KERNELS = ("laplace", "rbf", "energy", "pseudo_huber")
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def kernel_reference(kernel, x, y, bandwidth):
    """k(x, y) of two particles as printed, in mpmath."""
    dim = len(x)
    squared = mp.fsum((mp.mpf(float(a)) - mp.mpf(float(b))) ** 2 for a, b in zip(x, y, strict=True))
    bandwidth, c = mp.mpf(float(bandwidth)), mp.mpf("0.03")
    if kernel == "laplace":
        return mp.exp(-bandwidth * max(mp.sqrt(squared), mp.mpf("1e-8")) / dim)
    if kernel == "rbf":
        return mp.exp(-bandwidth * squared / (2 * dim))
    if kernel == "energy":
        return -squared
    return c - mp.sqrt(squared + c**2)


def mmd_reference(kernel, y_t, y_r, bandwidth):
    """1 / M^2 times the double sum over j and k, for one group."""
    m = len(y_t)
    total = mp.mpf(0)
    for j in range(m):
        for k in range(m):
            total += kernel_reference(kernel, y_t[j], y_t[k], bandwidth)
            total += kernel_reference(kernel, y_r[j], y_r[k], bandwidth)
            total -= 2 * kernel_reference(kernel, y_t[j], y_r[k], bandwidth)
    return total / m**2


def mmd_vectorized(kernel, y_t, y_r, bandwidth):
    """The same in extended precision, all particles at once: for large D. Each (M, D)."""
    y_t, y_r = (np.asarray(y, dtype=np.longdouble) for y in (y_t, y_r))
    dim, c = y_t.shape[1], np.longdouble("0.03")

    def k(x, y):
        squared = ((x[:, None] - y[None]) ** 2).sum(-1)
        return {
            "laplace": lambda: np.expm1(-bandwidth * np.maximum(np.sqrt(squared), np.longdouble("1e-8")) / dim),
            "rbf": lambda: np.expm1(-bandwidth * squared / (2 * dim)),
            "energy": lambda: -squared,
            "pseudo_huber": lambda: -squared / (c + np.sqrt(squared + c**2)),
        }[kernel]()

    return (k(y_t, y_t) + k(y_r, y_r) - 2 * k(y_t, y_r)).mean()


def randn(*shape, seed=0, scale=0.5):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_kernel
@pytest.mark.parametrize(("groups", "m", "dim"), [(3, 4, 5), (1, 1, 3), (2, 1, 1), (2, 5, 1)])
@pytest.mark.parametrize("distance", [1.0, 1e-3])
def test_mmd_equals_the_naive_double_loop(kernel, groups, m, dim, distance):
    y_r = randn(groups, m, dim)
    y_t = y_r + distance * randn(groups, m, dim, seed=1)
    bandwidth = torch.tensor([2.0, 11.0, 400.0], dtype=torch.float64)[:groups]
    mmd = grouped_mmd(y_t, y_r, bandwidth, kernel)
    assert (mmd.shape, mmd.dtype) == ((groups,), torch.float64)
    for g in range(groups):
        expected = mmd_reference(kernel, y_t[g].tolist(), y_r[g].tolist(), bandwidth[g].item())
        # 1e-12 on the scale of the terms, which are of order 1 and cancel
        assert abs(mp.mpf(mmd[g].item()) - expected) < 1e-12 * max(1, abs(expected))
        assert abs(mp.mpf(mmd[g].item()) - expected) < 1e-8 * expected, "and of the result itself"


def test_vectorized_reference_is_the_double_loop():
    y_t, y_r = randn(3, 4), randn(3, 4, seed=1)
    for kernel in KERNELS:
        expected = mmd_reference(kernel, y_t.tolist(), y_r.tolist(), 3.0)
        assert float(mmd_vectorized(kernel, y_t.numpy(), y_r.numpy(), 3.0)) == pytest.approx(float(expected), rel=1e-13)


def branches(gap, t=0.9, s=0.2, groups=4, m=4, dim=1024):
    """(y_t, y_r) of a smooth network on the same data and noise at t and at t - gap, in fp64, and the bandwidth."""
    x, eps = randn(groups, m, dim, seed=2), randn(groups, m, dim, seed=3)

    def f(u):
        x_u = (1 - u) * x + u * eps
        return x_u - 0.5 * (u - s) * torch.tanh(x_u + 3 * u)

    return f(t), f(t - gap), torch.full((groups,), 1 / (0.5 * (t - s)), dtype=torch.float64)


@every_kernel
@pytest.mark.parametrize("t", [0.5, 0.9, 0.994])
@pytest.mark.parametrize(("gap", "tolerance"), [(1e-2, 1e-4), (1e-3, 1e-4), (1e-4, 1e-4), (1e-5, 1e-2), (1.4e-6, 1e-2)])
def test_fp32_particles_keep_the_loss(kernel, t, gap, tolerance):
    """At k = 12 t - r goes down to 1.4e-6. Rounding y to fp32 (3e-8) alone costs 1e-3 of such a loss, not more."""
    y_t, y_r, bandwidth = branches(gap, t)
    mmd = grouped_mmd(y_t.float(), y_r.float(), bandwidth, kernel)
    assert mmd.dtype == torch.float64
    for g in range(len(mmd)):
        expected = float(mmd_vectorized(kernel, y_t[g].numpy(), y_r[g].numpy(), bandwidth[g].item()))
        assert mmd[g].item() == pytest.approx(expected, rel=tolerance)


@every_kernel
@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1.4e-6])
def test_fp32_particles_keep_the_direction_of_the_gradient(kernel, gap):
    y_t, y_r, bandwidth = branches(gap)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        particles = y_t.to(dtype, copy=True).requires_grad_()
        grouped_mmd(particles, y_r.to(dtype), bandwidth, kernel).sum().backward()
        gradients.append(particles.grad.double().flatten())
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    # Rounding y to fp32 turns y_t - y_r by about 3e-8 / 1.4e-6 = 2 % at worst, a cosine of 1 - 2e-4.
    assert cosine > 1 - 1e-3


@every_kernel
def test_the_loss_is_never_negative_in_fp32(kernel):
    """The V-statistic is a squared norm; of identical sets in another order it is 0."""
    for gap in (1e-4, 1.4e-6):
        y_t, y_r, bandwidth = branches(gap)
        assert (grouped_mmd(y_t.float(), y_r.float(), bandwidth, kernel) > 0).all()


DEGENERATE = {
    "identical branches": (lambda y: y, (2, 3, 4)),
    "M = 1 and identical": (lambda y: y, (2, 1, 4)),
    "all particles equal": (lambda y: 0 * y + y[:, :1], (2, 3, 4)),
    "branches in another order": (lambda y: y.flip(1), (2, 3, 4)),
}


@every_kernel
@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bandwidth", [1.0, 1e8])
def test_degenerate_groups_have_loss_0_and_a_finite_gradient(kernel, case, dtype, bandwidth):
    """1e8 is the bandwidth at s = t, 1 / max(|c_out|, 1e-8)."""
    transform, shape = DEGENERATE[case]
    y_r = transform(randn(*shape)).to(dtype)
    y_t = (y_r.clone() if "order" not in case else randn(*shape).to(dtype)).requires_grad_()
    loss = grouped_mmd(y_t, y_r, torch.full((2,), bandwidth, dtype=torch.float64), kernel)
    loss.sum().backward()
    # All terms are of order 1 or less and cancel exactly up to their sums.
    assert loss.abs().max() < 1e-14
    assert torch.isfinite(y_t.grad).all()


@every_kernel
def test_gradient_is_that_of_the_naive_double_loop(kernel):
    y_t, y_r = randn(1, 3, 4).requires_grad_(), randn(1, 3, 4, seed=1)
    (gradient,) = torch.autograd.grad(grouped_mmd(y_t, y_r, torch.ones(1) * 5, kernel).sum(), y_t)
    h = mp.mpf("1e-12")
    base = [[mp.mpf(v) for v in row] for row in y_t[0].tolist()]

    def loss(particles):
        dim, m = 4, 3

        def k(x, y):
            squared = mp.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True))
            return {
                "laplace": lambda: mp.exp(-5 * max(mp.sqrt(squared), mp.mpf("1e-8")) / dim),
                "rbf": lambda: mp.exp(-5 * squared / (2 * dim)),
                "energy": lambda: -squared,
                "pseudo_huber": lambda: mp.mpf("0.03") - mp.sqrt(squared + mp.mpf("0.03") ** 2),
            }[kernel]()

        fixed = [[mp.mpf(v) for v in row] for row in y_r[0].tolist()]
        pairs = [(j, i) for j in range(m) for i in range(m)]
        return sum(k(particles[j], particles[i]) - 2 * k(particles[j], fixed[i]) for j, i in pairs) / m**2

    for j in range(3):
        for d in range(4):
            up = [[v + h * (a == j and b == d) for b, v in enumerate(row)] for a, row in enumerate(base)]
            down = [[v - h * (a == j and b == d) for b, v in enumerate(row)] for a, row in enumerate(base)]
            expected = float((loss(up) - loss(down)) / (2 * h))
            assert gradient[0, j, d].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [1, 2, 4, 16])
def test_energy_is_twice_the_squared_distance_of_the_means(dtype, m):
    y_t, y_r = randn(3, m, 7).to(dtype), randn(3, m, 7, seed=1).to(dtype)
    mmd = grouped_mmd(y_t, y_r, torch.ones(3), "energy")
    expected = 2 * ((y_t.double().mean(1) - y_r.double().mean(1)) ** 2).sum(-1)
    # exact in fp64; the particles are what they are, so fp32 ones cost nothing that fp64 sums would not
    torch.testing.assert_close(mmd, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


@pytest.mark.parametrize("kernel", ["energy", "pseudo_huber"])
def test_energy_and_pseudo_huber_ignore_the_bandwidth(kernel):
    y_t, y_r = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    one, other = (grouped_mmd(y_t, y_r, torch.tensor(b), kernel) for b in ([1.0, 2.0], [1e8, 0.1]))
    assert torch.equal(one, other)


@every_kernel
def test_energy_and_pseudo_huber_ignore_d_and_the_others_divide_by_it(kernel):
    y_t, y_r = randn(1, 3, 4), randn(1, 3, 4, seed=1)
    padding = torch.zeros(1, 3, 12, dtype=torch.float64)
    padded = [torch.cat([y, padding], dim=-1) for y in (y_t, y_r)]  # same distances, D = 16
    factor = 1.0 if kernel in ("energy", "pseudo_huber") else 4.0
    mmd = grouped_mmd(*padded, torch.tensor([3.0 * factor]), kernel)
    # sums of 16 instead of 4 squares: a rounding or two
    torch.testing.assert_close(mmd, grouped_mmd(y_t, y_r, torch.tensor([3.0]), kernel), rtol=1e-13, atol=0)


@every_kernel
@properties
@given(data=st.data())
def test_the_order_of_particles_and_of_groups_does_not_matter(kernel, data):
    groups, m = 4, 5
    y_t, y_r, bandwidth = randn(groups, m, 3), randn(groups, m, 3, seed=1), torch.tensor([1.0, 2.0, 4.0, 8.0])
    permutation = st.permutations(range(m))
    of_t, of_r = data.draw(permutation), data.draw(permutation)
    of_groups = data.draw(st.permutations(range(groups)))
    base = grouped_mmd(y_t, y_r, bandwidth, kernel)
    shuffled = grouped_mmd(y_t[:, of_t][of_groups], y_r[:, of_r][of_groups], bandwidth[of_groups], kernel)
    torch.testing.assert_close(shuffled, base[of_groups], rtol=1e-12, atol=1e-15)


@every_kernel
def test_groups_do_not_see_each_other(kernel):
    y_t, y_r, bandwidth = randn(3, 4, 5), randn(3, 4, 5, seed=1), torch.tensor([1.0, 2.0, 3.0])
    together = grouped_mmd(y_t, y_r, bandwidth, kernel)
    alone = [grouped_mmd(y_t[g : g + 1], y_r[g : g + 1], bandwidth[g : g + 1], kernel) for g in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-14, atol=0)


def test_laplace_gradient_has_norm_2_over_m_squared_d_per_particle_whatever_the_gap():
    """Through y = ... + c_out G with bandwidth 1 / |c_out| the two cancel (section 3, numerics)."""
    m, dim = 4, 1024
    for t_minus_s in (0.5, 1e-2, 1e-4):
        t = 0.9
        c_out = -0.5 * t_minus_s
        y_t, y_r, _ = branches(1e-2 * t_minus_s, t, t - t_minus_s, groups=8, dim=dim)
        out = torch.zeros_like(y_t, requires_grad=True)
        bandwidth = torch.full((8,), 1 / abs(c_out), dtype=torch.float64)
        grouped_mmd(y_t + c_out * out, y_r, bandwidth).sum().backward()
        norms = out.grad.norm(dim=-1)
        # the off-diagonal terms, which nearly cancel, move it by a few percent
        torch.testing.assert_close(norms, torch.full_like(norms, 2 / (m**2 * dim)), rtol=0.1, atol=0)


def test_an_unknown_kernel_is_refused_with_the_choice():
    with pytest.raises(UserError, match=r"'gauss'.*laplace, rbf, energy, pseudo_huber"):
        grouped_mmd(randn(1, 2, 3), randn(1, 2, 3), torch.ones(1), "gauss")


def test_two_far_particles_reach_the_bound_of_the_bounded_kernels():
    """k <= 1 and two points infinitely far apart: MMD = 1 + 1 - 0, less the 1e-8 of the least distance."""
    y_t, y_r = torch.full((1, 1, 2), 1e6), torch.full((1, 1, 2), -1e6)
    for kernel in ("laplace", "rbf"):
        assert grouped_mmd(y_t, y_r, torch.ones(1), kernel).item() == pytest.approx(2.0, abs=2e-8)
    expected = 2 * (math.sqrt(2 * 4e12 + 0.03**2) - 0.03)
    assert grouped_mmd(y_t, y_r, torch.ones(1), "pseudo_huber").item() == pytest.approx(expected, rel=1e-6)
