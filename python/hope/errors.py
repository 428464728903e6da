"""The one exception that means "the user can fix this"."""


class HopeError(ValueError):
    """Wrong configuration, data, file or option; the command line prints it without a traceback."""
