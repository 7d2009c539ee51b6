"""Flow matching: the baseline. One time, and a regression on what makes f_{s,t} exact for every s."""

from dataclasses import dataclass

from torch import Tensor

from imm_scale import rng
from imm_scale.choices import option
from imm_scale.data.batch import Batch
from imm_scale.fusion import fused
from imm_scale.methods.base import FlowMapMethod, FlowMapMethodConfig, GroupLosses, prior_noise
from imm_scale.methods.flow_map import FlowMap, exact_target, per_sample
from imm_scale.methods.probability_path import diffuse
from imm_scale.registry import register_method


@dataclass(frozen=True)
class FlowMatchingConfig(FlowMapMethodConfig):
    name: str = option("flow_matching", "")


@register_method("flow_matching")
class FlowMatching(FlowMapMethod):
    """Mean squared error of the velocity (Lipman et al., arXiv 2210.02747), t ~ U(t_min, t_max) for each sample."""

    Config = FlowMatchingConfig

    def loss(self, net: FlowMap, batch: Batch, seed: int) -> GroupLosses:
        x_t, target, t, label, dropout_key = self.draw(net, batch.x, batch.condition, batch.ordinal, seed)
        out = net.average(x_t, t, t, label, dropout_key)
        return GroupLosses(_mean_square(out, target, t), t)

    @fused()
    def draw(
        self, flow_map: FlowMap, x: Tensor, label: Tensor, ordinal: Tensor, seed: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """x_t, what the net shall answer, t (G,), labels and keys of the dropout masks."""
        c = self.config
        t = c.t_min + (c.t_max - c.t_min) * rng.uniform(seed, "times", self.group(ordinal))[:, 0]
        eps = prior_noise(flow_map, x, ordinal, seed)
        t_N = per_sample(t, x)
        x_t = diffuse(flow_map.interp, x, eps, t_N)
        target = exact_target(flow_map.interp, flow_map.parameterization, x, eps, t_N, flow_map.sigma_data)
        label = self.drop_labels(flow_map, label, ordinal, seed)
        return x_t, target, t, label, self.dropout_key(flow_map, ordinal, seed)


@fused()
def _mean_square(out: Tensor, target: Tensor, t_G: Tensor) -> Tensor:
    """(G,) fp64 mean squared errors."""
    return (out - target).square().reshape(t_G.shape[0], -1).mean(dim=1).double()
