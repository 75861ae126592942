"""A prediction in parts, as a job array runs them: which files are whose, and the tables joined.

A part writes into a folder of its own. The one that ends last joins the tables.
"""

import hashlib
import json
import os
import pathlib
import re

from prn_jax import disk, tables
from prn_jax.errors import UserError, shown, shown_first

_Names = dict[pathlib.Path, str]


def parse(text: str) -> tuple[int, int]:
    """Reads `2/8`, the second of eight parts.

    Raises:
      UserError: it is no such thing.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--shard={text}: give the part and of how many, 1/8 to 8/8")
    return number, count


def select(names: _Names, number: int, count: int) -> _Names:
    """The files of a part, whatever else is there: by a hash of their paths, about as many each.

    Args:
      names: from `predictions.find`.
      number: of the part, from 1.
      count: of the parts.
    """
    return {
        path: name
        for path, name in names.items()
        if int(hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest(), 16) % count
        == number - 1
    }


def folder(output: str | os.PathLike, number: int, count: int) -> pathlib.Path:
    """Where a part's tables and pictures go."""
    return pathlib.Path(os.path.expanduser(output)) / f"part_{number}_of_{count}"


def join(output: str | os.PathLike, count: int) -> str:
    """Joins the tables if all parts have ended, by the images' paths; says what was done.

    Args:
      output: the folder of the whole prediction; gets `predictions.csv` and `predictions.json`.
      count: of the parts.
    """
    folders = [folder(output, number, count) for number in range(1, count + 1)]
    waiting = [str(number) for number, x in enumerate(folders, 1) if not _is_done(x)]
    if waiting:
        return (
            f"{count - len(waiting)} of {count} parts are done, not {shown_first(waiting, 10)}; "
            "the last one to end joins the tables"
        )
    if len({_made_by(x) for x in folders}) > 1:
        return (
            "the parts are of several checkpoints or thresholds: run those of the earlier ones "
            "again to join"
        )
    output = pathlib.Path(os.path.expanduser(output))
    rows = []
    for part in folders:
        for row in json.loads((part / "predictions.json").read_text()):
            name = row.get("pictures") and f"{part.name}/{row['pictures']}"
            rows.append(row | {"pictures": name or ""})
    rows.sort(key=lambda row: row["image"])
    disk.write_file(output / "predictions.json", json.dumps(rows, indent=2) + "\n")
    disk.write_file(output / "predictions.csv", tables.as_csv(rows))
    disk.write_file(output / "predictions.jsonl", _made_by(folders[0]))  # whose they are
    return f"all {count} parts are done: {shown(output / 'predictions.csv')}"


def _is_done(part: pathlib.Path) -> bool:
    """Not while it runs again: see `predictions.predict_files`."""
    return (part / "predictions.json").exists()


def _made_by(part: pathlib.Path) -> str:
    """The first line of what a next call reads: the checkpoint's."""
    with (part / "predictions.jsonl").open() as file:
        return file.readline()
