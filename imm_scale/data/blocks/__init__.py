"""Blocks of neighbouring samples: kept on the node (cache), read (reader), and held while steps need them (window)."""
