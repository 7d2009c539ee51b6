"""Flow matching: the baseline. One time, and a regression on what makes f_{s,t} exact for every s."""

from dataclasses import dataclass

from torch import Tensor

from imm_scale import rng
from imm_scale.choices import option
from imm_scale.data.batch import Batch
from imm_scale.fusion import fused
from imm_scale.methods.base import FlowMapMethod, GroupLosses, prior_noise
from imm_scale.methods.flow_map import FlowMap, Given, by_block, exact_target, mean_of_blocks, per_sample
from imm_scale.methods.in_blocks import draws as block_draws
from imm_scale.methods.one_time import OneTimeConfig
from imm_scale.methods.probability_path import diffuse
from imm_scale.registry import register_method


@dataclass(frozen=True)
class FlowMatchingConfig(OneTimeConfig):
    name: str = option("flow_matching", "")

    @property
    def why_not_blocks(self) -> str:
        return ""


@register_method("flow_matching")
class FlowMatching(FlowMapMethod):
    """Mean squared error of the velocity (Lipman et al., arXiv 2210.02747), each sample at a time of its own."""

    Config = FlowMatchingConfig

    def loss(self, net: FlowMap, batch: Batch, seed: int) -> GroupLosses:
        x_t, target, t, label, dropout_key, given = self.draw(net, batch.x, batch.condition, batch.ordinal, seed)
        out = net.average(x_t, t, t, label, dropout_key, given=given)
        out, target = by_block(out, net.blocks), by_block(target, net.blocks)
        loss = _mean_square(out, target, t.flatten())
        loss, t = (block_draws.mean_of_replicas(v, self.config.replicas) for v in (loss, t.flatten()))
        whole, t = (mean_of_blocks(values, net.blocks) for values in (loss, t))
        return GroupLosses(whole, t, block_draws.by_place(loss, net.blocks))

    def draw_times(self, group: Tensor, seed: int) -> Tensor:
        """t of each group, fp64, shape (G,)."""
        c = self.config
        return c.t_min + (c.t_max - c.t_min) * c.place(rng.uniform(seed, "times", group)[:, 0])

    @fused()
    def draw(
        self, flow_map: FlowMap, x: Tensor, label: Tensor, ordinal: Tensor, seed: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Given | None]:
        """x_t, what the net shall answer, t (G,) or (G, J), labels, keys of dropout masks, what blocks are given."""
        replicas = self.config.replicas
        keys = block_draws.keys(block_draws.numbers(self.group(ordinal), replicas), flow_map.blocks)
        t = block_draws.shaped(self.draw_times(keys, seed), flow_map.blocks)
        given = self.given(flow_map, x, ordinal, seed)
        label = block_draws.repeated(self.drop_labels(flow_map, label, ordinal, seed), replicas)
        x = block_draws.repeated(x, replicas)
        eps = prior_noise(flow_map, x, block_draws.numbers(ordinal, replicas), seed)
        t_N = per_sample(t, x)
        x_t = diffuse(flow_map.interp, x, eps, t_N)
        target = exact_target(flow_map.interp, flow_map.parameterization, x, eps, t_N, flow_map.sigma_data)
        return x_t, target, t, label, self.dropout_key(flow_map, ordinal, seed), given


@fused()
def _mean_square(out: Tensor, target: Tensor, t_G: Tensor) -> Tensor:
    """(G,) fp64 mean squared errors."""
    return (out - target).square().reshape(t_G.shape[0], -1).mean(dim=1).double()
