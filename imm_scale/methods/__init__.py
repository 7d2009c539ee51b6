"""How to sample, and what to minimize so that this sampler is right: methods, paths, samplers."""
