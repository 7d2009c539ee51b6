"""What a net costs, by closed forms. A multiply-add counts once, as in the DiT and IMM papers' GFLOPs."""

from imm_scale.models.dit import DiTConfig

# One forward without gradient, one forward with, one backward (two forwards' worth).
IMM_FORWARDS_PER_STEP = 4
FLOW_MATCHING_FORWARDS_PER_STEP = 3
_TIME_CHANNELS = 256


def forward_multiply_adds(net: DiTConfig) -> int:
    """Multiply-adds of one forward pass of one sample, embedders included."""
    tokens, width = net.tokens, net.width
    patch = net.patch_size**2 * net.channels
    hidden = int(width * net.mlp_ratio)
    attention = tokens * 4 * width**2 + 2 * tokens**2 * width
    mlp = 2 * tokens * width * hidden
    block = attention + mlp + 6 * width**2
    final = tokens * width * patch + 2 * width**2
    embedders = (2 if net.second_time else 1) * (_TIME_CHANNELS * width + width**2)
    return tokens * patch * width + net.depth * block + final + embedders


def training_multiply_adds(net: DiTConfig, objective: str, global_batch_size: int) -> int:
    """Multiply-adds of one optimizer step."""
    forwards = FLOW_MATCHING_FORWARDS_PER_STEP if objective == "flow_matching" else IMM_FORWARDS_PER_STEP
    return forwards * forward_multiply_adds(net) * global_batch_size
