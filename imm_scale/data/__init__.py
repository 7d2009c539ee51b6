"""From shards on storage to one step's batch: format (manifest, shards), order (sample_order), reading (dataset,
blocks, loader)."""
