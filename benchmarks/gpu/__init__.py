"""Every GPU path, proven and timed by one command: `make gpu`, or `python -m benchmarks.gpu --out DIR`."""
