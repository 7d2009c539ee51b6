"""Tools that make data sets: `imm-scale pack`, `encode`, `verify` and `stats`, or `python -m data_tools.pack`."""
