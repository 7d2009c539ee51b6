"""Sampling block by block: every sampler within a block, against kept keys and values of those before.

The first call of a block carries the block before it, which is clean now, so there are as many calls as steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from imm_scale.methods.flow_map import FlowMap, Given
from imm_scale.methods.samplers import Guidance, Noise
from imm_scale.models.block_causal import BlockCausal, Cache

Sampler = Callable[..., Tensor]


class BlockMap(FlowMap):
    """f_{s,t} of the next block, given those that are known: a flow map on the rows of one block.

    Attributes:
        known: (N, C, rows, W) all blocks that are known, none at first.
    """

    guide: "BlockMap | None"

    def __init__(self, flow_map: FlowMap, known: Tensor):
        super().__init__(
            flow_map.model,
            flow_map.interp,
            flow_map.parameterization,
            flow_map.second_time,
            flow_map.sigma_data,
            flow_map.time_scale,
            flow_map.null_label,
            flow_map.time_input,
        )
        self.known = known
        self._caches = {True: Cache(), False: Cache()}  # by whether there is a label
        self.guide = None if flow_map.guide is None else BlockMap(flow_map.guide, known)

    def learn(self, block: Tensor) -> None:
        """A block (N, C, rows, W) is known from now on, here and to the guide."""
        self.known = torch.cat([self.known, block], dim=2)
        if self.guide is not None:
            self.guide.learn(block)

    def _answer(
        self, scaled: Tensor, times: tuple[Tensor, Tensor | None], label: Tensor, labelled: bool = True, **told: Tensor
    ) -> Tensor:
        """By kept keys and values, which the blocks join that became known since the last such call."""
        assert not told, "a net of several blocks is not told its guidance"
        net, cache = self.model, self._caches[labelled]
        assert isinstance(net, BlockCausal), type(net)
        since = self.known[:, :, cache.blocks * scaled.shape[2] :]
        given = None
        if since.shape[2] or net.starts(cache):
            given = self.context(Given(since, torch.zeros(1, dtype=torch.float64, device=scaled.device)))
        return net.next_block(scaled, *times, label, cache, given)


@torch.no_grad()
def sample(
    flow_map: FlowMap,
    sampler: Sampler,
    start: Tensor,
    grids: Sequence[Tensor],
    label: Tensor,
    guidance: Guidance,
    fresh_noise: Noise | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Samples (N, C, H, W), block after block.

    Args:
        sampler: of `samplers.SAMPLERS`; it runs within each block.
        start: (N, C, H, W) of the prior, in whose rows each block starts.
        grids: the falling times of each block.
        fresh_noise: as for `sampler`, of whole samples.
        given: (N, C, rows, W), the first blocks, where they are known from the beginning.
    """
    rows = start.shape[2] // flow_map.blocks
    net = BlockMap(flow_map, start[:, :, :0] if given is None else given.to(start))
    for j in range(net.known.shape[2] // rows, flow_map.blocks):
        of_block = slice(rows * j, rows * (j + 1))
        noise = None if fresh_noise is None else _rows_of(fresh_noise, of_block)
        net.learn(sampler(net, start[:, :, of_block], grids[j], label, guidance, noise))
    return net.known


def _rows_of(noise: Noise, rows: slice) -> Noise:
    return lambda step: noise(step)[:, :, rows]
