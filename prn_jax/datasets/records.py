"""The folder of a category's TFRecords: replaced as a whole, or left as it was."""

import contextlib
from collections.abc import Iterator

from etils import epath


def remove_unfinished(folder: epath.Path) -> None:
    """What processes that were killed have left of TFRecords."""
    for path in folder.iterdir():
        if path.name.startswith("incomplete."):
            path.rmtree(missing_ok=True)


@contextlib.contextmanager
def set_aside(folder: epath.Path) -> Iterator[None]:
    """TFRecords give way to those that are written within; where that fails they come back."""
    aside = folder.parent / f"before_{folder.name}"
    if not folder.exists() and aside.exists():  # of a process that was killed
        aside.rename(folder)
    aside.rmtree(missing_ok=True)
    if folder.exists():
        folder.rename(aside)
    try:
        yield
    finally:
        if folder.exists():
            aside.rmtree(missing_ok=True)
        elif aside.exists():
            aside.rename(folder)
