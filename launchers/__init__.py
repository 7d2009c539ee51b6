"""One line from a config to a cluster, run from the checkout: `python -m launchers.submit --help`."""
