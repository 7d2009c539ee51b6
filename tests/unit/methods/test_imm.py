"""The IMM objective (alg 3, eq 67): the loss itself and its special cases (section 4)."""

import math

import numpy as np
import pytest
import torch

from imm_scale.methods.imm import InductiveMomentMatching
from imm_scale.methods.imm_times import map_r
from imm_scale.methods.probability_path import ddim, diffuse
from imm_scale.methods.special_cases import ConsistencyTraining
from imm_scale.models.base import Backbone
from tests.unit.methods.small import BASE, COSINE, OT, SIGMA_D, Net, batch, clean, flow_map_of, gmmn, losses, varied

# ---------------------------------------------------------------------------------------------------------------------
# The loss as a whole, against a plain double loop


def loss_reference(net, calls, x, m, parameterization, kernel, a, b):
    """Equation 67 for `ot_fm`, a group and a pair at a time, from the times and inputs the net was called with."""
    (in_r, c_r, _, _, _), (in_t, c_t, second, label, _) = calls
    losses = []
    for g in range(len(c_t)):
        t, r, s = (float(v[g]) / 1000 for v in (c_t, c_r, second))
        rows = slice(g * m, (g + 1) * m)

        def coefficients(u, s=s):
            norm = math.sqrt((1 - u) ** 2 + u**2)
            if parameterization == "euler_fm":
                return 1.0, -SIGMA_D * (u - s), norm
            if parameterization == "simple_edm":
                return ((1 - s) * (1 - u) + s * u) / norm**2, -SIGMA_D * (u - s) / norm, norm
            return s / u, (u - s) / u, norm

        outs = []
        for inputs, u, c in ((in_t, t, c_t), (in_r, r, c_r)):
            c_skip, c_out, norm = coefficients(u)
            out = net(inputs[rows], c[g : g + 1], second[g : g + 1], label[rows]).detach()
            outs.append((c_skip * inputs[rows] * SIGMA_D * norm + c_out * out).reshape(m, -1).numpy())
        y_t, y_r = outs
        bandwidth, dim = 1 / abs(coefficients(t)[1]), y_t.shape[1]

        def k(p, q, bandwidth=bandwidth, dim=dim):
            distance = max(float(np.sqrt(((p - q) ** 2).sum())), 1e-8)
            return {
                "laplace": math.exp(-bandwidth * distance / dim),
                "rbf": math.exp(-bandwidth * distance**2 / (2 * dim)),
                "energy": -(distance**2),
                "pseudo_huber": 0.03 - math.sqrt(distance**2 + 0.03**2),
            }[kernel]

        total = sum(k(y_t[j], y_t[i]) + k(y_r[j], y_r[i]) - 2 * k(y_t[j], y_r[i]) for j in range(m) for i in range(m))
        lam = 2 * math.log((1 - t) / t)
        weight = 0.5 / (1 + math.exp(lam - b)) * 2 / (t * (1 - t)) * (1 - t) ** a / ((1 - t) ** 2 + t**2)
        losses.append(weight * total / m**2)
    return np.array(losses)


@pytest.mark.parametrize("kernel", ["laplace", "rbf", "energy", "pseudo_huber"])
@pytest.mark.parametrize("parameterization", ["euler_fm", "simple_edm", "identity"])
def test_loss_is_equation_67(kernel, parameterization):
    objective = varied(BASE, particles=3, k=8, kernel=kernel, a=2.0, b=5.0)
    net = Net()
    f = flow_map_of(net, parameterization=parameterization)
    x, label, ordinal = batch(objective, 7)
    group_losses = losses(objective, f, x, label, ordinal, seed=3)
    assert len(net.calls) == 2
    assert 0 < (net.calls[0][1] == net.calls[0][2]).sum() < 7, "some groups have the exact target r = s, some have not"
    expected = loss_reference(net, net.calls[:2], x, 3, parameterization, kernel, 2.0, 5.0)
    # The reference sums terms of order 1 that cancel: 1e-15 each, times a weight up to 10.
    np.testing.assert_allclose(group_losses.loss_G.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    assert group_losses.loss_G.dtype == torch.float64
    np.testing.assert_allclose(group_losses.t_G.numpy(), net.calls[1][1].numpy() / 1000, rtol=1e-12)


@pytest.mark.parametrize("interp", [OT, COSINE], ids=lambda i: i.name)
@pytest.mark.parametrize("second_time", ["s", "t_minus_s"])
def test_both_branches_see_the_same_noise_the_same_labels_and_their_own_times(interp, second_time):
    net = Net()
    f = flow_map_of(net, interp, "simple_edm", second_time)
    objective = varied(BASE, k=8)
    x, label, ordinal = batch(objective, 12)
    losses(objective, f, x, label, ordinal, seed=1)
    (in_r, c_r, second_r, label_r, _), (in_t, c_t, second_t, label_t, _) = net.calls
    t, r = c_t / 1000, c_r / 1000
    s, s_of_r = (second_t / 1000, second_r / 1000)
    if second_time == "t_minus_s":
        s, s_of_r = t - s, r - s_of_r
    torch.testing.assert_close(s, s_of_r, rtol=0, atol=1e-15)
    assert ((s >= 0) & (s <= r + 1e-15) & (r <= t) & (t <= 0.996)).all()
    assert (r < t).all()
    assert torch.equal(label_t, label)
    assert torch.equal(label_r, label)

    def noise(inputs, u):
        u = u.repeat_interleave(4).view(-1, 1, 1, 1)
        return (SIGMA_D * interp.norm(u) * inputs - interp.alpha(u) * x) / interp.sigma(u)

    seen = r > 1e-3  # where x_r has noise to read off, with an error of 1e-16 / 1e-3
    assert seen.sum() > 6
    keep = seen.repeat_interleave(4)
    torch.testing.assert_close(noise(in_t, t)[keep], noise(in_r, r)[keep], rtol=0, atol=1e-11)
    # and so x_r is DDIM(x_t, x, r, t)
    wide_r, wide_t = (u.repeat_interleave(4).view(-1, 1, 1, 1) for u in (r, t))
    x_t = SIGMA_D * interp.norm(wide_t) * in_t
    moved = ddim(interp, x_t, x, wide_r, wide_t)
    torch.testing.assert_close(SIGMA_D * interp.norm(wide_r) * in_r, moved, rtol=0, atol=1e-12)


def test_noise_is_normal_with_standard_deviation_sigma_d_and_differs_between_samples():
    net = Net()
    objective = varied(BASE, particles=2)
    x, label, ordinal = batch(objective, 500, shape=(40,))
    losses(objective, flow_map_of(net), 0 * x, label, ordinal, seed=1)
    t = (net.calls[1][1] / 1000).repeat_interleave(2)[:, None]
    eps = SIGMA_D * OT.norm(t) * net.calls[1][0] / t
    # 40,000 draws at 4.5 standard errors
    assert abs(eps.mean().item()) < 4.5 * 0.5 / 200
    assert abs(eps.std().item() - 0.5) < 4.5 * 0.5 / math.sqrt(80_000)
    assert abs(np.corrcoef(eps[0::2].flatten(), eps[1::2].flatten())[0, 1]) < 4.5 / math.sqrt(20_000)


def test_times_of_many_groups_fill_their_range_and_reach_no_further():
    objective = varied(BASE, t_min=0.006)
    s, r, t = objective.draw_times(flow_map_of(), torch.arange(20_000), seed=0)
    u_t, u_s = (t - 0.006) / (0.994 - 0.006), (s - 0.006) / (t - 0.006)
    assert ((s >= 0.006) & (s <= r) & (r <= t) & (t <= 0.994)).all()
    for u in (u_t, u_s):  # uniform, by Kolmogorov and Smirnov at p = 1e-3
        ranks = torch.arange(1, 20_001, dtype=torch.float64) / 20_000
        assert (u.sort().values - ranks).abs().max() < 1.95 / math.sqrt(20_000) + 1 / 20_000
    assert abs(np.corrcoef(u_t, u_s)[0, 1]) < 4.5 / math.sqrt(20_000)


@pytest.mark.parametrize(
    "settings_of_r",
    [
        {"min_gap": 1e-2},
        {"k": 8},
        {"mapping": "t"},
        {"mapping": "log_snr", "t_max": 0.9},
        {"mapping": "inverse_eta"},
        {"eta_max": 40.0, "eta_min": 2.0},
    ],
    ids=lambda given: "-".join(given),
)
def test_r_follows_the_settings_of_the_objective(settings_of_r):
    s, r, t = varied(BASE, **settings_of_r).draw_times(flow_map_of(), torch.arange(400), seed=0)
    others = {"min_gap": 0.0, "mapping": "eta", "eta_max": 160.0, "eta_min": 0.0, "k": 12, "t_max": 0.994}
    expected = map_r(OT, s, t, **{**others, **settings_of_r})
    assert torch.equal(r, expected)
    assert not torch.equal(r, map_r(OT, s, t, **others)), "and the setting matters here"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of the specification: the loss at initialization and at the optimum

TABLE = [
    # D, k, M, a, loss, std of a group (None: not published)
    (4096, 12, 2, 1.0, 1.96e-2, 3.0e-2),
    (4096, 12, 4, 1.0, 9.89e-3, 1.53e-2),
    (4096, 12, 8, 1.0, 4.96e-3, 7.7e-3),
    (4096, 12, 4, 2.0, 7.85e-3, None),
    (64, 10, 4, 1.0, 0.1495, 0.166),
]


def init_integrand(dim, k, m, a, t, s):
    """(2 / M) w (1 - exp(-rho (t - r) / (t - s))) at rho = sqrt(2 / D), of one (s, t), b = 4, `ot_fm`."""
    step = 160 / 2**k
    eta = np.maximum(t / (1 - t) - step, 0.0)
    r = np.maximum(s, eta / (1 + eta))
    weight = t * (1 - t) ** (a - 1) / ((t**2 + math.exp(-4) * (1 - t) ** 2) * ((1 - t) ** 2 + t**2))
    return 2 / m * weight * -np.expm1(-math.sqrt(2 / dim) * (t - r) / (t - s))


def over_times(integrand, n=1200):
    """Mean and standard deviation over t ~ U(0, 0.994), s ~ U(0, t) by the midpoint rule."""
    u = (np.arange(n) + 0.5) / n
    t = 0.994 * u[:, None]
    values = integrand(t, t * u[None, :])
    return values.mean(), values.std()


@pytest.mark.parametrize(("dim", "k", "m", "a", "loss", "std"), TABLE)
def test_the_published_loss_at_initialization_follows_from_its_closed_form(dim, k, m, a, loss, std):
    mean, spread = over_times(lambda t, s: init_integrand(dim, k, m, a, t, s))
    # rho is taken at its mean: a relative error of 1 / (4 D), and at D = 64 the curvature of exp besides
    assert mean == pytest.approx(loss, rel=0.01)
    if std is not None:
        assert spread == pytest.approx(std, rel=0.02)  # two published digits


def table_losses(dim, k, m, a, groups, net=None):
    objective = varied(BASE, particles=m, k=k, a=a)
    shape = (4, int(math.sqrt(dim / 4)), int(math.sqrt(dim / 4)))
    x, label, ordinal = batch(objective, groups, shape=shape, dtype=torch.float32)
    f = flow_map_of(Net(zero=True) if net is None else net)
    with torch.no_grad():
        loss, t, _ = losses(objective, f, x, label, ordinal, seed=0)
    s, _, _ = objective.draw_times(f, ordinal[::m] // m, seed=0)
    return loss.numpy(), t.numpy(), s.numpy()


@pytest.mark.parametrize(("dim", "k", "m", "a", "loss", "std"), TABLE)
def test_loss_at_initialization_is_the_published_one(dim, k, m, a, loss, std):
    groups = {4096: 512 // m, 64: 8192}[dim]
    group_losses, t, s = table_losses(dim, k, m, a, groups)
    error = group_losses.std() / math.sqrt(groups)
    assert abs(group_losses.mean() - loss) < 3 * error
    # With the same times in the closed form the noise of the times drops out: a test some fifty times sharper.
    residual = group_losses - init_integrand(dim, k, m, a, t, s)
    assert abs(residual.mean()) < 3 * residual.std() / math.sqrt(groups) + 0.01 * loss
    assert residual.std() < 0.1 * group_losses.std()


class GaussianOptimum(Backbone):
    """G of the PF-ODE map of N(0, sigma_d^2) data under `euler_fm`: f_{s,t}(x) = sqrt(V_s / V_t) x."""

    def forward(self, x, c_noise, second, label, dropout_key=None):
        t, s = ((v / 1000).repeat_interleave(len(x) // len(v)).view(-1, 1, 1, 1) for v in (c_noise, second))
        norm_t, norm_s = (((1 - u) ** 2 + u**2).sqrt() for u in (t, s))
        # x comes in scaled to unit variance: x_t = x norm_t / 2
        # (norm_t - norm_s) / (t - s), also where s = t
        average_velocity = x * SIGMA_D * 2 * (t + s - 1) / (norm_t + norm_s)
        return (average_velocity / SIGMA_D).to(x.dtype)


def test_loss_does_not_fall_to_zero_at_the_optimum():
    group_losses, _, _ = table_losses(64, 10, 4, 1.0, 16_384, GaussianOptimum())
    error = group_losses.std() / math.sqrt(len(group_losses))
    assert abs(group_losses.mean() - 0.135) < 3 * error + 0.0005  # and half of the last digit
    assert group_losses.mean() + 3 * error < 0.1495, "though below its value at initialization"


def test_optimum_maps_the_prior_to_the_data_in_one_step():
    f = flow_map_of(GaussianOptimum())
    x = clean(1, 500, shape=(1, 4, 4))
    times = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    y = f(x, *times, torch.zeros(500, dtype=torch.long))
    torch.testing.assert_close(y, x, rtol=1e-12, atol=0)  # V_0 = V_1 = sigma_d^2


# ---------------------------------------------------------------------------------------------------------------------
# Special cases


@pytest.mark.parametrize("kind", [InductiveMomentMatching, ConsistencyTraining])
@pytest.mark.parametrize("parameterization", ["euler_fm", "simple_edm"])
def test_one_particle_and_the_energy_kernel_is_consistency_training(kind, parameterization):
    config = kind.Config(particles=1, t_min=0.006, t_max=0.994, kernel="energy", k=8, label_drop=0.0)
    objective = kind(config.resolved("fp32"))
    net = Net()
    f = flow_map_of(net, parameterization=parameterization)
    x, label, ordinal = batch(objective, 20)
    loss, t, _ = losses(objective, f, x, label, ordinal, seed=0)
    s, r, _ = objective.draw_times(f, ordinal, seed=0)
    (in_r, *_), (in_t, *_) = net.calls
    if kind is ConsistencyTraining:
        assert (s == 0.006).all()
        assert (r < t).all()
    wide = (-1, 1, 1, 1)
    y_t = f(SIGMA_D * OT.norm(t).view(wide) * in_t, s, t, label)
    y_r = f(SIGMA_D * OT.norm(r).view(wide) * in_r, s, r, label)
    weight = t / ((t**2 + math.exp(-4.0) * (1 - t) ** 2) * ((1 - t) ** 2 + t**2))
    expected = 2 * weight * (y_t - y_r).flatten(1).square().sum(1)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-15)


def test_t_1_with_r_and_s_0_is_a_generative_moment_matching_network():
    f = flow_map_of()
    x, eps = clean(1, 4), clean(1, 4, seed=1)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    label = torch.zeros(4, dtype=torch.long)
    x_t, x_r = diffuse(OT, x, eps, one), diffuse(OT, x, eps, zero)
    assert torch.equal(x_t, eps)
    y_t, y_r = f.pair(x_t, x_r, zero, zero, one, label)
    assert torch.equal(y_r, x), "the target is the data itself"
    discrepancy = BASE.discrepancy(f, y_t, y_r, zero, one).item()
    p, q = y_t.detach().flatten(1).numpy(), x.flatten(1).numpy()

    def k(a, b):  # 1 / |c_out| = 2, D = 18
        distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
        return np.exp(-2.0 * np.maximum(distance, 1e-8) / 18)

    assert discrepancy == pytest.approx((k(p, p) + k(q, q) - 2 * k(p, q)).mean(), rel=1e-10)  # and w = 1


@pytest.mark.parametrize("interp", [OT, COSINE], ids=lambda i: i.name)
def test_the_moment_matching_objective_compares_one_jump_from_noise_with_the_data(interp):
    net = Net()
    f = flow_map_of(net, interp, "simple_edm")
    objective = gmmn(particles=4, t_min=0.0, t_max=1.0, kernel="energy", label_drop=0.0)
    x, label, ordinal = batch(objective, 6)
    loss, t, _ = losses(objective, f, x, label, ordinal, seed=0)
    assert (t == 1.0).all()
    eps = SIGMA_D * net.calls[1][0]  # c_in = 1 / sigma_d at t = 1
    jumped = -SIGMA_D * net(net.calls[1][0], 1000 * t, 0 * t, label)  # c_skip = 0, c_out = -sigma_d
    assert eps.std().item() == pytest.approx(SIGMA_D, rel=0.2)
    means = [y.view(6, 4, -1).mean(1) for y in (jumped, x)]
    weight = 1.0 if interp is OT else math.pi / 2
    expected = weight * 2 * (means[0] - means[1]).square().sum(1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
