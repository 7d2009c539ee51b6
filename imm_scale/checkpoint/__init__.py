"""What a run leaves on storage, and how it is read back on any number of ranks."""
