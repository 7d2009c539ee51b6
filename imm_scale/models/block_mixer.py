"""The small net of a block's branch: an MLP that mixes the block's tokens, then its channels, under adaLN.

An MLP of each token alone would draw the tokens of a block independently given the blocks before. One MLP over the
flattened block would see them all too, with weights that grow as the square of tokens times channels: 85 million in
the first layer of 64 tokens at width 1152. Mixing places and channels in turn (MLP-Mixer, arXiv 2105.01601) lets every
token see the whole block in every layer with a few thousand weights more than the MLP of each token.

Legend: N samples, J blocks of b tokens, T = J b, R rows of b tokens, D width of the transformer, W width of this net.
"""

import torch
from torch import Tensor, nn

from imm_scale.models.layers import Mlp, adaln_projection, modulate


class MixerLayer(nn.Module):
    """Tokens, then channels, each a residual MLP with shift, scale and gate by the condition."""

    def __init__(self, tokens: int, width: int, mlp_ratio: float, condition_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mix_tokens = Mlp(tokens, max(1, int(tokens * mlp_ratio)))
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mix_channels = Mlp(width, max(1, int(width * mlp_ratio)))
        self.adaLN_modulation = adaln_projection(width, 6, condition_width)

    def forward(self, x_RbW: Tensor, condition_RD: Tensor) -> Tensor:
        """(R, b, W) of blocks, each under a condition of its own."""
        shift_t, scale_t, gate_t, shift_c, scale_c, gate_c = self.adaLN_modulation(condition_RD).chunk(6, dim=1)
        mixed = self.mix_tokens(modulate(self.norm1(x_RbW), shift_t, scale_t).transpose(1, 2)).transpose(1, 2)
        x_RbW = x_RbW + gate_t[:, None] * mixed
        return x_RbW + gate_c[:, None] * self.mix_channels(modulate(self.norm2(x_RbW), shift_c, scale_c))


class BranchMlp(nn.Module):
    """Tokens of noisy blocks, each made of its patch and the clean state at its place in the block before."""

    def __init__(
        self,
        channels: int,
        patch_size: int,
        tokens: int,
        width: int,
        depth: int,
        mlp_ratio: float,
        condition_width: int,
    ):
        super().__init__()
        self.x_embedder = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.state_norm = nn.LayerNorm(condition_width, elementwise_affine=False, eps=1e-6)
        self.state_embedder = nn.Linear(condition_width, width)
        self.layers = nn.ModuleList(MixerLayer(tokens, width, mlp_ratio, condition_width) for _ in range(depth))
        # Tokens that stand in the clean stream for the block before the first. An embedding is a module, so that
        # sharded weights are gathered for it.
        self.begin = nn.Embedding(tokens, condition_width)

    def begin_tokens(self, samples: int) -> Tensor:
        """(N, b, D), the same for all samples."""
        places = torch.arange(self.begin.num_embeddings, device=self.begin.weight.device)
        out: Tensor = self.begin(places)[None].expand(samples, -1, -1)
        return out

    def embedded(self, states_NTD: Tensor) -> Tensor:
        """(N, T, W) of the clean stream's states: once for all branches and replicas."""
        out: Tensor = self.state_embedder(self.state_norm(states_NTD))
        return out

    def forward(self, x: Tensor, states_NTW: Tensor, condition_NJD: Tensor) -> Tensor:
        """(N, T, W) of blocks x (N, C, rows, width), the states before them and what they are told, in their order."""
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2)
        rows = condition_NJD.flatten(0, 1)
        # In the dtype of the condition: fp32 under autocast, as the transformer's residual stream.
        mixed = (tokens + states_NTW).to(rows.dtype).reshape(len(rows), -1, tokens.shape[-1])
        for layer in self.layers:
            mixed = layer(mixed, rows)
        return mixed.reshape(tokens.shape)
