"""Token models that were trained elsewhere, and what `imm-scale profile` says of them."""
