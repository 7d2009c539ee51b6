"""The page of the two axes: quality against passes along the sequence, refinement passes, and the work of both."""
