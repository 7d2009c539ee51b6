"""Samples of a trained flow map.

spec, flow_map = export.load_flow_map("runs/demo/imm")
for index, label, z in sampling.sample(flow_map, spec, sampling.SamplingPlan(steps=2, num=1000)):
    ...
"""

from imm_scale.sampling.draw import SamplingPlan, sample

__all__ = ["SamplingPlan", "sample"]
