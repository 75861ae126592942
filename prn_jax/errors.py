"""The exceptions that programs turn into one line, and how paths are written in it."""

import os


class UserError(Exception):
    """A wrong path, field or file.

    The message is one line that names the thing and the mend. Programs in `launch/` print it
    without a traceback and exit with status 1.
    """


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM) and can go on.

    Programs in `launch/` print the message and exit with status 0.
    """


def shown(path: str | os.PathLike) -> str:
    """A path as it can be printed: in one line, what isn't text being escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)
