"""A prediction's rows: what is known of an image, what is asked of it, which earlier ones hold.

`predictions.jsonl` holds what is known, for the next call; `predictions.csv` and
`predictions.json` what people ask for, verdicts by today's thresholds among it.
"""

import contextlib
import csv
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from prn_jax import disk, images, regions
from prn_jax.errors import UserError, shown
from prn_jax.predict import Detector, Inspection

FIELDS = ("image", "score", "verdict", "highest", "row", "column", "distance", "unfamiliar",
          "regions", "largest", "nearest", "pictures", "error")  # fmt: skip
# Endings of maps: that of MVTec AD's own evaluation, and one that no image has.
MAPS = {"tiff": ".tiff", "npy": "_map.npy"}
_LIMITS = ("threshold", "distance")  # of `Asked`: verdicts depend on them, rows do not
FILES = ("predictions.csv", "predictions.json", "predictions.jsonl")

Row = dict[str, Any]
Key = tuple[str, int, int, int]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked of a prediction.

    Attributes:
      threshold: score from which an image is anomalous; None: no verdicts.
      pixel_threshold: value from which a pixel is anomalous; None: neither masks nor regions.
      distance: from which a whole image is unfamiliar: not the product, or the light has changed;
        None: it is not said.
      min_area: of a region, in pixels of the image.
      pictures: heat maps, overlays, masks.
      maps: "tiff" or "npy": the maps themselves, float32; "": none.
      explain: beside each alarm the nearest normal image.
    """

    threshold: float | None = None
    pixel_threshold: float | None = None
    distance: float | None = None
    min_area: int = 1
    pictures: bool = True
    maps: str = ""
    explain: bool = False

    def alarms(self, row: Row) -> bool:
        """Whether an image is anomalous or unfamiliar."""
        return any(
            limit is not None and row[name] >= limit
            for name, limit in (("score", self.threshold), ("distance", self.distance))
        )

    def every_file(self) -> list[str]:
        """The endings of the files that an image may have, an alarm's too."""
        return self.files({"score": np.inf, "distance": np.inf})

    def files(self, row: Row) -> list[str]:
        """The endings of an image's files."""
        kinds = []
        if self.pictures:
            kinds = ["_heat.png", "_overlay.png"]
            kinds += ["_mask.png"] * (self.pixel_threshold is not None)
        kinds += ["_why.png"] * (self.explain and self.alarms(row))
        return kinds + [MAPS[self.maps]] if self.maps else kinds


def beside(stem: pathlib.Path, ending: str) -> pathlib.Path:
    """An image's file."""
    return stem.with_name(stem.name + ending)


def key(path: pathlib.Path) -> Key | None:
    """What tells an image from others and its file from what it was; taken before it is read."""
    state = images.state(path)
    return state and (os.path.abspath(path), *state)


def holds(row: Row, output: pathlib.Path, name: str, asked: Asked) -> bool:
    """Whether all files that are asked for are there, under the name that they are to have.

    A file that no call with this checkpoint wrote may be an earlier one's. Rows of an earlier
    version do not say which were written.
    """
    endings = asked.files(row)
    return not endings or (
        row["pictures"] == name
        and set(endings) <= set(row.get("files", endings))
        and all(beside(output / name, x).exists() for x in endings)
    )


def make(
    path: pathlib.Path, key: Key | None, found: Inspection, name: str, asked: Asked
) -> tuple[Row, np.ndarray]:
    """What is known of an image, and its mask at the pixel threshold, bool [h, w].

    Args:
      path: its file.
      key: of it, as it was when it was read; None where no later call asks for it.
      found: of this image.
      name: of its files; "" where there are none.
      asked: what is asked for.
    """
    row, column = divmod(int(found.map.argmax()), found.map.shape[1])
    mask, cut = np.zeros(found.map.shape, bool), None
    if asked.pixel_threshold is not None:
        mask, cut = regions.find(found.map, asked.pixel_threshold, asked.min_area)
    known = {
        "image": text(path),
        "key": key,
        "pictures": name,
        "score": float(found.score),
        "highest": round(float(found.map.max()), 6),
        "row": row,
        "column": column,
        "distance": float(found.distance),
        "regions": cut,
        "error": "",
    }
    return known | {"files": asked.files(known)}, mask


def failed(path: pathlib.Path, error: UserError) -> Row:
    """The row of a file that cannot be read."""
    return {"image": text(path), "error": str(error)}


def text(path: pathlib.Path) -> str:
    """A path for the tables, which are UTF-8: other bytes are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def public(row: Row, asked: Asked) -> Row:
    """A row as people read it; `regions` is the list, "" where there is no pixel threshold."""
    shown_row = {name: row.get(name, "") for name in FIELDS}
    shown_row["pictures"] = text(shown_row["pictures"])
    if row["error"]:
        return shown_row
    if asked.threshold is not None:
        shown_row["verdict"] = "anomalous" if row["score"] >= asked.threshold else "normal"
    if asked.distance is not None:
        shown_row["unfamiliar"] = "yes" if row["distance"] >= asked.distance else "no"
    if row["regions"] is None:
        shown_row["regions"] = ""
    else:
        shown_row["largest"] = max((x["area"] for x in row["regions"]), default=0)
    if not (asked.explain and asked.alarms(row)):
        shown_row["nearest"] = ""
    return shown_row


def as_csv(rows: Sequence[Row], header: bool = True) -> str:
    """Public rows, `regions` being their number."""
    text = io.StringIO()
    # By itself Python 3.11 quotes a line feed in a name, but no carriage return.
    quoting = csv.QUOTE_ALL if any("\r" in row["image"] for row in rows) else csv.QUOTE_MINIMAL
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n", quoting=quoting)
    if header:
        writer.writeheader()
    for row in rows:
        counted = len(row["regions"]) if row["regions"] != "" else ""
        writer.writerow(row | {"regions": counted})
    return text.getvalue()


def _made_by(detector: Detector, asked: Asked) -> dict[str, Any]:
    """What tells a network's scores and regions from another's, and verdicts from others."""
    return {
        "checkpoint": detector.digest,
        "score_pixels": detector.config.score_pixels,
        "pixel_threshold": asked.pixel_threshold,
        "min_area": asked.min_area,
    } | {name: getattr(asked, name) for name in _LIMITS}


def _of_rows(made_by: dict[str, Any]) -> dict[str, Any]:
    """What rows depend on: they hold scores, not verdicts."""
    return {name: value for name, value in made_by.items() if name not in _LIMITS}


def is_earlier(output: pathlib.Path) -> bool:
    """Whether an earlier call wrote the tables of a folder."""
    try:
        with (output / "predictions.jsonl").open("rb") as file:
            return "checkpoint" in json.loads(file.readline())
    except (OSError, ValueError, TypeError):
        return False


def check_free(output: pathlib.Path) -> None:
    """Refuses to replace tables that no prediction wrote, as a whole or in parts.

    Raises:
      UserError: naming one.
    """
    if any(map(is_earlier, (output, *output.glob("part_*_of_*")))):
        return
    for path in (output / name for name in FILES):
        if path.is_file() and path.stat().st_size:
            raise in_the_way(path)


def in_the_way(path: pathlib.Path) -> UserError:
    """The error of a file that is not ours to replace."""
    return UserError(
        f"{shown(path)} would be replaced, and no prediction wrote it: give another --output"
    )


def earlier(output: pathlib.Path, detector: Detector, asked: Asked) -> dict[Key, Row]:
    """Rows that an earlier call wrote and that still hold, by their images' keys."""
    rows: dict[Key, Row] = {}
    lines = (output / "predictions.jsonl").read_text("utf-8", "surrogateescape").splitlines()
    made_by = None
    for line in lines:
        try:
            row = json.loads(line)
            if "checkpoint" in row:
                made_by = row
            elif not row["error"] and isinstance(row["pictures"], str):
                rows[tuple(row["key"])] = row
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a call that was killed
    if rows and _of_rows(made_by or {}) != _of_rows(_made_by(detector, asked)):
        logging.warning(
            "%s holds predictions of another checkpoint, pixel threshold or least area: they are "
            "replaced", shown(output)
        )  # fmt: skip
        return {}
    return rows


@contextlib.contextmanager
def written(
    output: pathlib.Path,
    detector: Detector,
    known: Iterable[Row],
    chosen: Iterable[Row],
    asked: Asked,
) -> Iterator:
    """Yields what writes rows as they come; both files begin with what was there before."""
    jsonl, table = output / "predictions.jsonl", output / "predictions.csv"
    lines = [_made_by(detector, asked), *known]
    disk.write_file(jsonl, "".join(_json_line(x) for x in lines))
    disk.write_file(table, as_csv([public(row, asked) for row in chosen]))
    with contextlib.ExitStack() as stack:
        files = []

        def write(rows: list[Row]) -> None:
            try:
                if not files:
                    # Without a buffer: what a full disk did not take is not tried again at the end.
                    files.extend(
                        stack.enter_context(path.open("ab", buffering=0)) for path in (jsonl, table)
                    )
                texts = (
                    "".join(_json_line(x) for x in rows),
                    as_csv([public(row, asked) for row in rows], header=False),
                )
                for file, text in zip(files, texts):
                    _append(file, text.encode())
            except OSError as error:
                raise UserError(f"cannot write to {shown(output)}: {error.strerror}") from error

        yield write


def _append(file: BinaryIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def _json_line(content: dict[str, Any]) -> str:
    return json.dumps(content) + "\n"  # ASCII: what is not text in a path stays escaped
