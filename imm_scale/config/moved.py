"""Keys of version 0.1 under the names they have now, so that its files and run folders are read."""

# The first that fits counts; a section stands for all its keys.
_MOVED = {
    "flow_map.sigma_data": "data.space.sigma_data",
    "flow_map.time_embedding": "model.time_embedding",
    "flow_map": "method.flow_map",
    "objective": "method",
}


def renamed(key: str) -> str:
    """The key of today; the same key where it has not moved."""
    for old, new in _MOVED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return key
