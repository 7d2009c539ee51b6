"""Sequences of tokens: what they are to a net, and what they stand for."""
