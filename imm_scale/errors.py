"""The two exceptions the command line prints as a message instead of a traceback."""


class UserError(ValueError):
    """A mistake in a config, an argument or a file. The message names the offending value and the remedy. Exit 2."""


class RunError(RuntimeError):
    """A run that cannot go on, through no fault in what it was told. The message says why and what to try. Exit 1."""
