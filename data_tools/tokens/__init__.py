"""Texts and images as tokens: sources, the split by document, shards, and what is said about them."""
