"""The folder of a category's TFRecords: replaced as a whole, or left as it was."""

import contextlib
import logging as std_logging
from collections.abc import Iterator

from absl import logging
from etils import epath


def remove_unfinished(folder: epath.Path) -> None:
    """What processes that were killed have left of TFRecords."""
    for path in folder.iterdir():
        if path.name.startswith("incomplete."):
            path.rmtree(missing_ok=True)


def _aside(folder: epath.Path) -> epath.Path:
    return folder.parent / f"before_{folder.name}"


def are_aside(folder: epath.Path) -> bool:
    """Whether a process was killed, or is at work, that has set TFRecords aside."""
    return _aside(folder).exists()


def bring_back(folder: epath.Path) -> None:
    """Brings TFRecords back that were set aside, where there are no others."""
    if not folder.exists() and _aside(folder).exists():
        _aside(folder).rename(folder)


@contextlib.contextmanager
def set_aside(folder: epath.Path) -> Iterator[None]:
    """TFRecords give way to those that are written within; where that fails they come back."""
    bring_back(folder)
    aside = _aside(folder)
    aside.rmtree(missing_ok=True)
    if folder.exists():
        folder.rename(aside)
    try:
        yield
    finally:
        if folder.exists():
            aside.rmtree(missing_ok=True)
        bring_back(folder)


def _is_news(record: std_logging.LogRecord) -> bool:
    """Lets through what isn't TFDS's routine: paths that it reads, configs that it doesn't know."""
    routine = record.levelno < std_logging.WARNING or "custom data configuration" in record.msg
    return not (routine and "tensorflow_datasets" in record.pathname)


logging.get_absl_logger().addFilter(_is_news)
