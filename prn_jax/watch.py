"""A folder that a camera writes to: what is new and complete in it, and what a network says."""

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from prn_jax import images, tables
from prn_jax.errors import UserError, shown, shown_first
from prn_jax.predict import Inspection
from prn_jax.tables import Asked

_State = tuple[int, int, int]
_REMEMBERED = 100_000  # images of folders that are away; most of them were tidied up


def new_images(
    folder: pathlib.Path,
    *,
    every: float = 0.5,
    existing: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[pathlib.Path]:
    """Yields image files that come from now on, and again those that are written anew. Never ends.

    A file is complete when it is not empty and neither its size nor its times of change became
    different from one look to the next. While the folder is away, or it or one in it cannot be
    read, which is said, nothing comes from there. What was yielded is not forgotten then, nor while
    a folder in it is away. The pictures of a prediction are no images.

    Args:
      folder: searched recursively; may be absent and come later.
      every: seconds between two looks.
      existing: yield what is there at the beginning too.
      sleep: waits so many seconds.
    """
    there = {} if existing else _states(folder, [])
    return _arrivals(folder, {path: state[:2] for path, state in there.items()}, every, sleep)


def _arrivals(folder, done, every, sleep):
    """What is new or other than `done`, which a caller reads at its own time."""
    seen: dict[pathlib.Path, _State] = {}
    trouble = ""
    while True:
        before, closed = trouble, []
        try:
            now = _states(folder, closed)
            trouble = "" if now or folder.is_dir() else f"{shown(folder)} is away"
            trouble = f"{shown_first(closed)} cannot be read" if closed else trouble
        except (OSError, UserError) as error:  # a share has its moments
            now, trouble = {}, str(error)
        if trouble != before:
            logging.warning("%s", f"{trouble}: waiting" if trouble else "the folder is back")
        for path, state in sorted(now.items(), key=lambda x: x[1][1]):  # the oldest first
            is_new = state[0] and done.get(path) != state[:2] and seen.get(path) == state
            if is_new and images.state(path) == state:  # the ones before it took their time
                done[path] = state[:2]  # a link to it, or other rights, make it no new image
                if not images.is_prediction(path):
                    yield path
        if now:  # else the folder may be away
            there = {path.parent for path in now}
            away = [  # so may be one in it
                path
                for path in done
                if path.parent not in there and not any(path.is_relative_to(x) for x in closed)
            ]
            gone = {path for path in done if path.parent in there and path not in now}
            for path in gone.union(away[:-_REMEMBERED]):
                del done[path]
        seen = now
        sleep(every)


def _states(folder: pathlib.Path, closed: list[pathlib.Path]) -> dict[pathlib.Path, _State]:
    """The state of each image file that is there; `closed` gets folders that may not be read."""
    found, _ = images.find_images(folder, closed=closed)
    states = {path: images.state(path) for path in found}
    return {path: state for path, state in states.items() if state}


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
        row, _ = tables.make(path, None, inspect(path), "", asked)
    except UserError as error:
        row = tables.failed(path, error)
    return tables.public(row, asked) | {"seconds": round(time.monotonic() - began, 4)}
