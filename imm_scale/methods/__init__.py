"""How to sample, and what to minimize so that this sampler is right. Importing this registers the methods."""

from imm_scale.methods.eulerian import Eulerian
from imm_scale.methods.flow_map import FlowMap, coefficients
from imm_scale.methods.flow_matching import FlowMatching
from imm_scale.methods.imm import InductiveMomentMatching
from imm_scale.methods.imm_times import map_r, weight
from imm_scale.methods.mmd import grouped_mmd
from imm_scale.methods.probability_path import OTFlowMatching, VPCosine, ddim
from imm_scale.methods.shortcut import Shortcut
from imm_scale.methods.special_cases import ConsistencyTraining, GenerativeMomentMatching
from imm_scale.methods.tokens.masked import MaskedDiffusion
from imm_scale.methods.tokens.next_block import NextBlock
from imm_scale.methods.tvm import TerminalVelocityMatching

__all__ = [
    "ConsistencyTraining",
    "Eulerian",
    "FlowMap",
    "FlowMatching",
    "GenerativeMomentMatching",
    "InductiveMomentMatching",
    "MaskedDiffusion",
    "NextBlock",
    "OTFlowMatching",
    "Shortcut",
    "TerminalVelocityMatching",
    "VPCosine",
    "coefficients",
    "ddim",
    "grouped_mmd",
    "map_r",
    "weight",
]
