"""The one exception that means "the user can mend this": the command line prints it and exits with 2."""


class UserError(ValueError):
    """A mistake in a config, an argument or a file. The message names the offending value and the remedy."""
