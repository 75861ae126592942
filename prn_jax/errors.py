"""The exceptions that programs turn into one line, and how paths are written in it."""

import contextlib
import os
import signal
import sys
import unicodedata
from collections.abc import Iterator, Sequence


class UserError(Exception):
    """A wrong path, field or file.

    The message is one line that names the thing and the mend. Programs print it
    without a traceback and exit with status 1.
    """


class Interrupted(BaseException):
    """The program was asked to stop and what it had is saved.

    As with KeyboardInterrupt, no library takes it for an error of its own. Programs print the
    message and exit with status 128 + the signal, as job systems expect of what did not come to its
    end: 143 after SIGTERM, 130 after Ctrl-C.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
    """Turns TensorFlow's errors into OSError, so that one `except` serves buckets and disks."""
    try:
        yield
    except Exception as error:
        tensorflow = sys.modules.get("tensorflow")
        if tensorflow is None or not isinstance(error, tensorflow.errors.OpError):
            raise
        raise OSError(error.message) from error


def shown(path: str | os.PathLike) -> str:
    """A path as it can be printed: in one line, what isn't text being escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def shown_first(names: Sequence[str | os.PathLike], most: int = 5) -> str:
    """The first `most` paths or names as they can be printed, and dots where there are more."""
    return ", ".join(map(shown, names[:most])) + (", ..." if len(names) > most else "")


def first_line(error: Exception) -> str:
    """What another library's error says first; its type, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def field_line(error: Exception) -> str:
    """What ml_collections says of a field that is not there or takes no such value, in one line.

    It has a KeyError, whose text would be in quotes, in an AttributeError.
    """
    inner = error.args[0] if isinstance(error, AttributeError) and error.args else error
    text = inner.args[0] if isinstance(inner, KeyError) and inner.args else inner
    return ": ".join(str(text).splitlines())


def normal_form(name: str) -> str:
    """A name as names are compared: with "ü" as one character, though a Mac writes two."""
    return unicodedata.normalize("NFC", name)


def is_plain(name: str) -> bool:
    """Whether every library and table takes a name as it is: UTF-8 text, in one line."""
    return not any(c == "\\" or c < " " or c == "\x7f" or "\ud800" <= c <= "\udfff" for c in name)
