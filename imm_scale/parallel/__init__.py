"""Ranks, ZeRO and the slices each rank owns."""
