"""What drawing a sequence of tokens costs in multiply-adds: states of positions, and the head where it draws.

Legend: T tokens, L steps of a masked net, B tokens of a block, P passes of a causal net.
"""

from imm_scale.models.base import Architecture
from imm_scale.planner.flops import token_multiply_adds


def of_masked(net: Architecture, steps: int, draws_all: bool) -> int:
    """L passes over T positions; the head draws each token once, or in every step all that are left, at most all T."""
    costs = token_multiply_adds(net)
    return steps * costs.states + (steps if draws_all else 1) * costs.head


def of_blocks(net: Architecture, block: int) -> int:
    """Each position passes once, for keys and values are kept: blocks cost passes, not work."""
    costs = token_multiply_adds(net)
    return costs.states + costs.head // block


def of_verified(net: Architecture, length: int, block: int, passes: float) -> int:
    """A first position, then B a pass; a pass has the head's draft and its answer at B + 1 places, as whole blocks."""
    costs, rounds = token_multiply_adds(net), passes - 1.0
    positions, blocks = 1.0 + rounds * block, rounds * (block + 2)
    return round((costs.states * positions + costs.head * blocks) / length)
