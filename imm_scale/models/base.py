"""What a flow map asks of a network."""

import torch
from torch import Tensor, nn


class ConditionalNet(nn.Module):
    """What the flow map asks of a network.

    `forward(x_NCHW, c_noise_G, second_G, label_N, dropout_key_N)` returns G of the shape of x; c_noise and second
    are per group (N is a multiple of G) and second is None where the second time is switched off.
    """

    def pair(
        self,
        x_t: Tensor,
        x_r: Tensor,
        c_noise_t: Tensor,
        c_noise_r: Tensor,
        second_t: Tensor | None,
        second_r: Tensor | None,
        label: Tensor,
        dropout_key: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both branches of IMM, the second without gradient. A sharded net overrides this to gather weights once."""
        with torch.no_grad():
            out_r = self(x_r, c_noise_r, second_r, label, dropout_key)
        return self(x_t, c_noise_t, second_t, label, dropout_key), out_r
