"""Samples of a trained flow map.

spec, net = export.load_net("runs/demo/imm")
for index, label, z in sampling.sample(net, spec, sampling.SamplingPlan(steps=2, num=1000)):
    ...
"""

from imm_scale.sampling.draw import SamplingPlan, sample

__all__ = ["SamplingPlan", "sample"]
