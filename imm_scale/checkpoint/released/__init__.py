"""The authors' checkpoints, read without running anything in them."""
