"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A wrong path, field or file.

    The message is one line that names the thing and the mend. Programs in `launch/` print it
    without a traceback and exit with status 1.
    """
