"""The exception for mistakes that the user can fix."""


class UserError(Exception):
    """A mistake of the user. Commands print it as one line without a traceback and exit with status 2.

    The message names the cause (file, key, value) and says what to do.
    """
