"""Checkpoints of the authors of IMM: pickles of their objects, read without their code and without running anything."""
