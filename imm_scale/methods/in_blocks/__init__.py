"""Samples that are drawn block by block: what losses draw for them, and their sampler."""
