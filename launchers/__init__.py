"""One line from a config to a cluster: `imm-scale submit --help`, or `python -m launchers.submit --help`."""
