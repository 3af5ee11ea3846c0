"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in what the user asked for: shown as one line, exit status 2, never a traceback.

    The message names the thing (file, key, value) and what to do about it.
    """
