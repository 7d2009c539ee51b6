"""From shards on storage to one step's batch: format (manifest, shards), order (plan), reading (dataset, loader)."""
