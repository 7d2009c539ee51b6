"""Self-contained HTML pages about runs and sweeps."""
