"""The exceptions that programs turn into one line."""


class UserError(Exception):
    """A wrong path, field or file.

    The message is one line that names the thing and the mend. Programs in `launch/` print it
    without a traceback and exit with status 1.
    """


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM) and can go on.

    Programs in `launch/` print the message and exit with status 0.
    """
