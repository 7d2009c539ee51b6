"""Gradients of the IMM objective: finite at the edges, equal to finite differences, alike however they are computed."""

import pytest
import torch

from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import diffuse
from imm_scale.models.base import Backbone
from tests.unit.methods.small import BASE, OT, SIGMA_D, Net, batch, clean, flow_map_of, losses, small_dit, varied


@pytest.mark.parametrize("kernel", ["laplace", "rbf", "energy", "pseudo_huber"])
@pytest.mark.parametrize("parameterization", ["euler_fm", "simple_edm", "identity"])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_times_give_finite_losses_and_gradients(kernel, parameterization, m, dtype):
    """s = t (loss 0), r = s, everything at 0, and the last time."""
    objective = varied(BASE, particles=m, kernel=kernel)
    f = flow_map_of(parameterization=parameterization)
    t = torch.tensor([0.5, 0.5, 0.0, 0.994, 1e-9], dtype=torch.float64)
    s = torch.tensor([0.5, 0.2, 0.0, 0.0, 0.0], dtype=torch.float64)
    r = torch.tensor([0.5, 0.2, 0.0, 0.994 - 1.4e-6, 0.0], dtype=torch.float64)
    x, eps = clean(5, m, dtype=dtype), clean(5, m, seed=1, dtype=dtype)
    wide = [u.repeat_interleave(m).view(-1, 1, 1, 1) for u in (t, r)]
    y_t, y_r = f.pair(diffuse(OT, x, eps, wide[0]), diffuse(OT, x, eps, wide[1]), s, r, t, torch.arange(5 * m))
    losses = objective.discrepancy(f, y_t, y_r, s, t)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(f.model.w.grad).all()
    assert losses[0].abs() < 1e-14
    assert losses[2] == 0.0
    assert f.model.w.grad.abs().max() > 0


def test_s_equal_t_gives_a_gradient_of_exactly_0():
    for parameterization in ("euler_fm", "simple_edm"):
        f = flow_map_of(parameterization=parameterization)
        u = torch.tensor([0.3, 0.9], dtype=torch.float64)
        x = clean(2, 4)
        y_t, y_r = f.pair(x, x, u, u, u, torch.arange(8))
        losses = BASE.discrepancy(f, y_t, y_r, u, u)
        losses.sum().backward()
        assert losses.abs().max() < 1e-14
        assert (f.model.w.grad == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


class FrozenTarget(FlowMap):
    """A flow map whose target branch stays what it was at the first call: a stop-gradient, for finite differences."""

    target = None

    def pair(self, *args, **kwargs):
        y_t, y_r = super().pair(*args, **kwargs)
        self.target = y_r if self.target is None else self.target
        return y_t, self.target


@pytest.mark.parametrize("kernel", ["laplace", "rbf", "energy", "pseudo_huber"])
@pytest.mark.parametrize("parameterization", ["euler_fm", "simple_edm", "identity"])
def test_gradient_agrees_with_finite_differences_at_a_fixed_target(kernel, parameterization):
    net = Net()
    f = FrozenTarget(net, OT, parameterization, "s", SIGMA_D)
    objective = varied(BASE, particles=3, k=8, kernel=kernel)
    x, label, ordinal = batch(objective, 4)

    def loss():
        return losses(objective, f, x, label, ordinal, seed=2).loss_G.mean()

    (gradient,) = torch.autograd.grad(loss(), net.w)
    h = 1e-5
    for i in range(len(net.w)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                net.w[i] += sign * h
                values.append(loss().item())
                net.w[i] -= sign * h
        # central differences: h^2 = 1e-10 of the third derivative, and 1e-16 / h of rounding
        assert gradient[i].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6, abs=1e-9)


def test_the_target_branch_passes_no_gradient_on():
    """Freed, the target would add a second gradient: the two must differ, and the code's is that of a fixed target."""
    net = Net()
    objective = varied(BASE, k=8)
    f = flow_map_of(net)
    x, label, ordinal = batch(objective, 6)
    (gradient,) = torch.autograd.grad(losses(objective, f, x, label, ordinal, seed=2).loss_G.mean(), net.w)
    s, r, t = objective.draw_times(f, torch.arange(6), seed=2)
    norms = [OT.norm(u.repeat_interleave(4)).view(-1, 1, 1, 1) for u in (r, t)]
    x_r, x_t = (call[0] * SIGMA_D * norm for call, norm in zip(net.calls, norms, strict=True))
    y_t, y_r = f(x_t, s, t, label), f(x_r, s, r, label)
    (fixed,) = torch.autograd.grad(objective.discrepancy(f, y_t, y_r.detach(), s, t).mean(), net.w, retain_graph=True)
    (free,) = torch.autograd.grad(objective.discrepancy(f, y_t, y_r, s, t).mean(), net.w)
    torch.testing.assert_close(gradient, fixed, rtol=1e-9, atol=1e-12)
    assert (free - gradient).abs().max() > 1e-2 * gradient.abs().max()


def gradients_of(net, objective, groups=5, **kwargs):
    net.zero_grad()
    f = flow_map_of(net, null_label=5, **kwargs)
    x, label, ordinal = batch(objective, groups, shape=(2, 4, 4))
    loss = losses(objective, f, x, label, ordinal, seed=0).loss_G
    loss.mean().backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dit_branches_run_block_by_block_equal_two_separate_calls(dropout):
    net = small_dit(dropout=dropout)
    objective = varied(BASE, k=8)
    loss, gradients = gradients_of(net, objective)
    net.pair = lambda *args: Backbone.pair(net, *args)
    separate_loss, separate = gradients_of(net, objective)
    torch.testing.assert_close(loss, separate_loss, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, separate[name], rtol=1e-9, atol=1e-14, msg=name)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_neither_loss_nor_gradient(dropout):
    net = small_dit(dropout=dropout)
    objective = varied(BASE, k=8)
    loss, gradients = gradients_of(net, objective)
    net.activation_checkpointing = True
    recomputed_loss, recomputed = gradients_of(net, objective)
    assert torch.equal(loss, recomputed_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name
