"""Tools that make data sets, run from the checkout: `python -m data_tools.pack`, `python -m data_tools.encode`."""
