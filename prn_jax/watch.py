"""A folder that a camera writes to: what is new and complete in it, and what a network says."""

import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from prn_jax import images, tables
from prn_jax.errors import UserError
from prn_jax.predict import Inspection
from prn_jax.tables import Asked

_State = tuple[int, int]


def new_images(
    folder: pathlib.Path,
    *,
    every: float = 0.5,
    existing: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[pathlib.Path]:
    """Yields image files that come from now on, and again those that are written anew. Never ends.

    A file is complete when it is not empty and neither its size nor its time of change became
    different from one look to the next.

    Args:
      folder: searched recursively; may be absent and come later.
      every: seconds between two looks.
      existing: yield what is there at the beginning too.
      sleep: waits so many seconds.
    """
    return _arrivals(folder, {} if existing else _states(folder), every, sleep)


def _arrivals(folder, done, every, sleep):
    """What is new or other than `done`, which a caller reads at its own time."""
    seen: dict[pathlib.Path, _State] = {}
    while True:
        now = _states(folder)
        for path, state in sorted(now.items(), key=lambda x: x[1][1]):  # the oldest first
            if state[0] and done.get(path) != state and seen.get(path) == state:
                done[path] = state
                yield path
        done = {path: state for path, state in done.items() if path in now}
        seen = now
        sleep(every)


def _states(folder: pathlib.Path) -> dict[pathlib.Path, _State]:
    """Size in bytes and time of change of each image file."""
    states = {}
    for path in images.find_images(folder)[0]:
        try:
            status = os.stat(path)
        except OSError:
            continue  # gone since it was listed
        states[path] = status.st_size, status.st_mtime_ns
    return states


def verdict(
    inspect: Callable[[pathlib.Path], Inspection], path: pathlib.Path, asked: Asked
) -> dict[str, Any]:
    """What a network says of one file: a row of `tables.public`, and the `seconds` that it took.

    Args:
      inspect: `predict.Detector.inspect`.
      path: the file.
      asked: the thresholds.
    """
    began = time.monotonic()
    try:
        row, _ = tables.make(path, inspect(path), "", asked)
    except UserError as error:
        row = tables.failed(path, error)
    return tables.public(row, asked) | {"seconds": round(time.monotonic() - began, 4)}
