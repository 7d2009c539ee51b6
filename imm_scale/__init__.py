"""Few-step image generators trained by Inductive Moment Matching (arXiv 2503.07565)."""
