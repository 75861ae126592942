"""A folder that a camera writes to: what is new and complete in it, and what a network says."""

import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from prn_jax import images
from prn_jax.errors import UserError, shown

_State = tuple[int, int]


def new_images(
    folder: pathlib.Path,
    *,
    every: float = 0.5,
    existing: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[pathlib.Path]:
    """Yields image files as they come, and again those that are written anew. Never ends.

    A file is complete when it is not empty and neither its size nor its time of change became
    different from one look to the next.

    Args:
      folder: searched recursively; may be absent and come later.
      every: seconds between two looks.
      existing: yield what is there at the beginning too.
      sleep: waits so many seconds.
    """
    done = {} if existing else _states(folder)
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
    detect: Callable[[pathlib.Path], tuple[Any, Any]], path: pathlib.Path, threshold: float | None
) -> dict[str, Any]:
    """What a network says of one file, in JSON's types.

    Args:
      detect: gives a map, float [h, w], and a score, as `predict.Detector`.
      path: the file.
      threshold: score from which it is anomalous; None: no verdict.

    Returns:
      `image`, `score`, `verdict` (anomalous, normal or ""), the map's `highest` value with its
      `row` and `column`, `seconds` that it took, `error` ("", or why the file cannot be read).
    """
    began = time.monotonic()
    try:
        values, score = detect(path)
    except UserError as error:
        return {"image": shown(path), "error": str(error)}
    row, column = divmod(int(values.argmax()), values.shape[1])
    called = "" if threshold is None else "anomalous" if score >= threshold else "normal"
    return {
        "image": shown(path),
        "score": float(score),
        "verdict": called,
        "highest": float(values.max()),
        "row": row,
        "column": column,
        "seconds": round(time.monotonic() - began, 4),
        "error": "",
    }
