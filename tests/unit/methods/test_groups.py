"""Particle groups: any spread of a global batch over ranks, accumulation and micro-batches draws the same things."""

from functools import cache

import pytest
import torch
import torch.distributed as dist

from imm_scale import rng
from imm_scale.data.sample_order import Layout, rank_groups
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap
from imm_scale.methods.probability_path import OTFlowMatching
from imm_scale.models.dit import DiT, DiTConfig
from tests import ranks
from tests.unit.methods.small import imm, losses

PARTICLES, GROUPS, SEED, CLOCK = 4, 64, 7, 64 * 4 * 5
OBJECTIVE = imm(particles=PARTICLES, t_min=0.0, t_max=0.994, k=10, label_drop=0.3)


@cache
def _flow_map() -> FlowMap:
    torch.manual_seed(0)
    net = DiT(DiTConfig(16, 2, 2, 2, 1, 4, 4, num_classes=3, dropout=0.2))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return FlowMap(net, OTFlowMatching(), null_label=net.null_label)


def _draws(ordinal: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything random about these samples, a row per sample."""
    return _drawn(tuple(ordinal.tolist()))


@cache  # many worlds cut out the same parts
def _drawn(ordinals: tuple[int, ...]) -> dict[str, torch.Tensor]:
    ordinal = torch.tensor(ordinals)
    flow_map = FlowMap(torch.nn.Identity(), OTFlowMatching(), null_label=3)  # type: ignore[arg-type]
    s, r, t = OBJECTIVE.draw_times(flow_map, OBJECTIVE.group(ordinal), SEED)
    key = OBJECTIVE.dropout_key(_flow_map(), ordinal, SEED)
    assert key is not None
    return {
        "times": torch.stack([s, r, t], dim=1).repeat_interleave(PARTICLES, dim=0),
        "noise": rng.normal(SEED, "noise", ordinal, (5,)),
        "label": OBJECTIVE.drop_labels(flow_map, ordinal % 3, ordinal, SEED),
        "dropout": key,
    }


def _parts(layout: Layout, rank: int) -> list[torch.Tensor]:
    """Ordinals of the real groups of each micro-batch of a rank."""
    groups = rank_groups(layout.num_groups, rank, layout.world_size)
    ordinals = CLOCK + torch.arange(groups.start * PARTICLES, groups.stop * PARTICLES)
    return list(ordinals.split(layout.slots_per_micro_batch * PARTICLES))


@pytest.mark.parametrize("world_size", range(1, GROUPS + 1))
def test_any_factorization_gives_the_same_groups_and_draws(world_size):
    whole = _draws(CLOCK + torch.arange(GROUPS * PARTICLES))
    for micro_groups in (1, 3, GROUPS):
        layout = Layout(GROUPS * PARTICLES, PARTICLES, world_size, micro_groups * PARTICLES)
        parts = [part for rank in range(world_size) for part in _parts(layout, rank)]
        assert torch.equal(torch.cat(parts), CLOCK + torch.arange(GROUPS * PARTICLES)), "every group once, in order"
        drawn = [_draws(part) for part in parts]
        for name, expected in whole.items():
            assert torch.equal(torch.cat([draw[name] for draw in drawn]), expected), name


def _loss_and_gradient(micro_groups: int) -> tuple[float, list, int]:
    """Loss and gradient of the global batch, summed over ranks by hand, and the collectives the loss itself issued."""
    from imm_scale.parallel import world as distributed

    world = distributed.detect()
    distributed.init(world)
    calls = []
    for name in ("all_reduce", "all_gather", "reduce_scatter_tensor", "broadcast", "all_gather_into_tensor", "barrier"):
        original = getattr(dist, name)
        setattr(dist, name, lambda *a, _n=name, _o=original, **k: (calls.append(_n), _o(*a, **k))[1])
    flow_map = _flow_map()
    total = torch.zeros((), dtype=torch.float64)
    for ordinal in _parts(Layout(GROUPS * PARTICLES, PARTICLES, world.size, micro_groups * PARTICLES), world.rank):
        x = 0.5 * rng.normal(1, "data", ordinal, (1, 4, 4))
        loss = losses(OBJECTIVE, flow_map, x, ordinal % 3, ordinal, SEED).loss_G.sum() / GROUPS
        loss.backward()
        total += loss.detach()
    issued = len(calls)
    gradient = torch.cat([p.grad.flatten() for p in flow_map.parameters() if p.grad is not None]).double()
    return float(distributed.all_sum(total)), distributed.all_sum(gradient).tolist(), issued


def test_any_number_of_ranks_gives_the_same_loss_and_gradient_and_the_loss_needs_no_collective():
    loss, gradient, issued = ranks.run(_loss_and_gradient, 1, GROUPS)[0]
    assert issued == 0
    largest = max(map(abs, gradient))
    for size, micro_groups in ((1, 7), (2, 32), (3, 64), (3, 5), (4, 16)):
        for other_loss, other_gradient, other_issued in ranks.run(_loss_and_gradient, size, micro_groups):
            assert other_issued == 0, "the loss issued a collective"
            # fp32 sums over groups in another order: 1e-7 each, a few hundred of them.
            assert other_loss == pytest.approx(loss, rel=1e-6)
            assert max(abs(a - b) for a, b in zip(other_gradient, gradient, strict=True)) < 2e-5 * largest


def test_a_group_that_is_not_whole_is_refused():
    with pytest.raises(UserError, match="7 samples are not whole groups of 4"):
        OBJECTIVE.group(torch.arange(7))
    with pytest.raises(UserError, match="group 0 is not whole on this rank"):
        OBJECTIVE.group(torch.arange(2, 10))
