"""What a loss draws for samples of several blocks: times of each block of a group, and the blocks that are given.

Of `replicas` branches of each sample, groups are made within a replica: particles of one group are different samples,
for those that share a sample know more of it than their own x_t tells. All of replica 0 comes first, then all of 1.

Legend: N samples, G groups, J blocks. Where J, or the replicas, are 1 nothing here changes a bit of anything.
"""

import torch
from torch import Tensor

from imm_scale import rng
from imm_scale.choices import MethodConfig
from imm_scale.errors import UserError
from imm_scale.methods.flow_map import FlowMap, Given, per_sample
from imm_scale.methods.probability_path import diffuse
from imm_scale.models.base import Backbone


def keys(group_G: Tensor, blocks: int) -> Tensor:
    """(G J,) numbers by which times are drawn, those of a group's blocks together: g J + j."""
    if blocks == 1:
        return group_G
    return (group_G[:, None] * blocks + torch.arange(blocks, device=group_G.device)).flatten()


def shaped(times: Tensor, blocks: int) -> Tensor:
    """(G, J) of (G J,), as the flow map takes times; (G,) where J is 1."""
    return times if blocks == 1 else times.view(-1, blocks)


def numbers(ordinal_N: Tensor, replicas: int) -> Tensor:
    """(replicas N,) numbers by which replicas are drawn, of samples or of groups: n replicas + i."""
    if replicas == 1:
        return ordinal_N
    return (ordinal_N * replicas + torch.arange(replicas, device=ordinal_N.device)[:, None]).flatten()


def repeated(x: Tensor, replicas: int) -> Tensor:
    """(replicas N, ...) of x (N, ...), replica after replica."""
    return x if replicas == 1 else x.repeat(replicas, *[1] * (x.dim() - 1))


def mean_of_replicas(values: Tensor, replicas: int) -> Tensor:
    """(G,) means over replicas of values (replicas G,)."""
    return values if replicas == 1 else values.view(replicas, -1).mean(dim=0)


def given(flow_map: FlowMap, x: Tensor, ordinal: Tensor, group_G: Tensor, seed: int, noise: float) -> Given | None:
    """The samples themselves, diffused to a time of U(0, noise) per group where that is above 0; None where J is 1."""
    if flow_map.blocks == 1:
        return None
    t = torch.zeros(group_G.shape, dtype=torch.float64, device=x.device)
    if noise == 0.0:
        return Given(x, t)
    t = noise * rng.uniform(seed, "context_times", group_G)[:, 0]
    eps = flow_map.sigma_data * rng.normal(seed, "context_noise", ordinal, tuple(x.shape[1:])).to(x.dtype)
    return Given(diffuse(flow_map.interp, x, eps, per_sample(t, x)), t)


def by_place(loss: Tensor, blocks: int) -> dict[str, Tensor]:
    """Losses (G J,) of blocks by their place in the sample, {loss_block_1: (G,), ...}; nothing where J is 1."""
    if blocks == 1:
        return {}
    return {f"loss_block_{j + 1}": part for j, part in enumerate(loss.detach().view(-1, blocks).unbind(dim=1))}


def check(method: MethodConfig, why_not: str, context_noise: float, backbone: Backbone) -> None:
    """Raises UserError for a method that cannot train such a backbone's blocks, and for noise on what nobody is given.

    Args:
        why_not: what keeps the method from samples of several blocks, "" where nothing does.
    """
    name, blocks = method.name, backbone.sequence_blocks
    if method.replicas > 1 and not backbone.branches_apart:
        raise UserError(
            f"method.replicas={method.replicas} repeats what model.branch=mlp makes cheap, and this net has no such "
            "branch: use method.replicas=1, or model.branch=mlp with model.blocks above 1"
        )
    if blocks > 1 and why_not:
        raise UserError(f"method.name={name} cannot train model.blocks={blocks}: {why_not}. Use model.blocks=1")
    if blocks == 1 and context_noise > 0.0:
        raise UserError(
            f"method.context_noise={context_noise:g} does nothing with model.blocks=1, where nothing is given: leave "
            "it at 0, or set model.blocks above 1"
        )
