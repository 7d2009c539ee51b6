"""Experiments of the documentation, one command each; every figure they print comes from the runs they make."""
