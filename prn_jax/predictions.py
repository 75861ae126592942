"""Files -> verdicts: a prediction over many files, its tables and pictures.

A row is written when its image is done: `predictions.csv` for people, and `predictions.jsonl` for
the next call, which goes on with what is missing. At the end `predictions.csv` and
`predictions.json` hold one row per image, in the order in which they were given.
"""

import collections
import concurrent.futures
import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import numpy as np
from absl import logging
from PIL import Image
from tqdm import tqdm

from prn_jax import evaluate, images, pictures, results
from prn_jax.checkpoints import check_outside
from prn_jax.errors import UserError, shown
from prn_jax.predict import Detector
from prn_jax.progress import duration

FIELDS = ("image", "score", "verdict", "highest", "row", "column", "error")
_PICTURES = ("heat", "overlay")
_TABLES = ("predictions.csv", "predictions.json", "predictions.jsonl")
_LONGEST_NAME = 200  # bytes; file systems take 255, with the ending of a picture and of a draft
_SECONDS_PER_LINE = 30.0

Row = dict[str, Any]


# --- which files ----------------------------------------------------------------------------------


def find(patterns: Sequence[str]) -> dict[pathlib.Path, str]:
    """Finds the images that a command line names, and names their pictures.

    Args:
      patterns: files (which are read whatever they are called), folders (searched recursively) and
        patterns.

    Returns:
      For each file the name of its pictures below the output folder, without their endings. What
      was skipped, files of earlier predictions among it, is logged.

    Raises:
      UserError: nothing was named, or nothing was found.
    """
    if not patterns:
        raise UserError("no images given: name files, folders or patterns after the flags")
    found: dict[str, tuple[pathlib.Path, pathlib.Path]] = {}
    skipped: list[pathlib.Path] = []
    own = 0
    for pattern in patterns:
        path = pathlib.Path(pattern).expanduser()
        here = [path] if os.path.lexists(path) else map(pathlib.Path, _matching(path))
        listed = [pair for x in here for pair in _listed(x, x == path, skipped)]
        own_here = sum(_is_own(file) for file, _ in listed)
        own += own_here
        # A shell's * names an earlier output folder and pictures too.
        if len(listed) == own_here and not own_here and not (path / _TABLES[-1]).exists():
            raise UserError(f"{shown(pattern)}: there are no images{_left_out(skipped, own)}")
        for file, name in listed:
            if not _is_own(file):
                found.setdefault(os.path.abspath(file), (file, name))
    if not found:
        raise UserError(f"{shown(patterns[0])}: there are no images{_left_out(skipped, own)}")
    if foreign := [path for path in skipped if path.name not in _TABLES]:
        logging.warning("skipped %s", images.describe(foreign))
    if own:
        logging.info("left out %d files of earlier predictions", own)
    names: dict[pathlib.Path, str] = {}
    taken: set[str] = set()
    for file, name in found.values():
        names[file] = _free_name(name.with_suffix(""), taken)
    return names


def _left_out(skipped: list[pathlib.Path], own: int) -> str:
    about = f"; skipped {images.describe(skipped)}" if skipped else ""
    return about + (f"; left out {own} files of earlier predictions" if own else "")


def _is_own(path: pathlib.Path) -> bool:
    """Whether an earlier prediction wrote a file."""
    return path.name in _TABLES or pictures.is_prediction(path)


def _matching(path: pathlib.Path) -> list[str]:
    """What a pattern matches; what exists of its beginning, as `box[2]` may, is no pattern."""
    literal = next(x for x in path.parents if x.exists())
    pattern = os.path.join(glob.escape(str(literal)), path.relative_to(literal))
    return sorted(glob.glob(pattern, recursive=True))


def _listed(
    path: pathlib.Path, is_named: bool, skipped: list[pathlib.Path]
) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Image files of a folder, or the file itself, each with its path below what was named."""
    if path.is_dir():
        files, rest = images.find_images(path)
        skipped += rest
        return [(file, file.relative_to(path)) for file in files]
    if not is_named and not images.is_image(path):
        skipped.append(path)
        return []
    return [(path, pathlib.Path(path.name))]


def _free_name(name: pathlib.Path, taken: set[str]) -> str:
    """A name that no other image's pictures have, and that is not too long."""
    stem = name.name
    if len(os.fsencode(stem)) > _LONGEST_NAME:
        digest = hashlib.sha256(os.fsencode(stem)).hexdigest()[:12]
        stem = f"{os.fsdecode(os.fsencode(stem)[: _LONGEST_NAME - 13])}-{digest}"
    number, chosen = 1, str(name.with_name(stem))
    while chosen in taken:
        number += 1
        chosen = str(name.with_name(f"{stem}_{number}"))
    taken.add(chosen)
    return chosen


# --- predicting -----------------------------------------------------------------------------------


def prepare(output: str | os.PathLike) -> pathlib.Path:
    """Makes the output folder.

    Raises:
      UserError: it cannot be made or written to.
    """
    check_outside(output, "--output")
    folder = pathlib.Path(output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "predictions.jsonl").open("a"):
            pass
    except OSError as error:
        raise UserError(f"cannot write to --output={shown(output)}: {error.strerror}") from error
    return folder


def predict_files(
    detector: Detector,
    names: dict[pathlib.Path, str],
    output: pathlib.Path,
    *,
    threshold: float | None = None,
    batch_size: int = 16,
    with_pictures: bool = True,
) -> list[Row]:
    """Predicts files and writes tables and pictures; what an earlier call did is not done again.

    An image is done again where its file, the checkpoint or what is asked for has changed, and
    where it could not be read. Images are read and pictures written by other threads.

    Args:
      detector: from `prn_jax.load`.
      names: from `find`.
      output: from `prepare`.
      threshold: score from which an image is anomalous; None: no verdicts.
      batch_size: images at a time.
      with_pictures: write heat maps and overlays.

    Returns:
      A row per image, in the order of `names`: `FIELDS`.

    Raises:
      UserError: something cannot be written.
    """
    done = _earlier(output, detector)
    rows = {
        path: done[key]
        for path, name in names.items()
        if (key := _key(path)) in done
        and (not with_pictures or _has_pictures(done[key], output, name))
    }
    if rows:
        logging.info("%d of %d images were done before", len(rows), len(names))
    missing = [path for path in names if path not in rows]
    if with_pictures:  # Whose pictures are overwritten now is done again when it is asked for.
        taken = {names[path] for path in missing}
        done = {key: row for key, row in done.items() if row["pictures"] not in taken}
    # The last batch and one with unreadable files are filled up: no other size is compiled.
    size = evaluate.fixed_size(len(missing), batch_size, detector.mesh)
    bar = tqdm(
        total=len(missing), unit="image", disable=not sys.stderr.isatty(), dynamic_ncols=True
    )
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    line = began = time.monotonic()
    with _written(output, detector, done.values(), rows.values(), threshold) as write, bar:
        try:
            for batch in _read_ahead(pool, missing, size, detector.white_level):
                readable = [image for _, image in batch if not isinstance(image, UserError)]
                found = iter(zip(*detector(readable, size, fill=True)))
                jobs = []
                for path, image in batch:
                    if isinstance(image, UserError):
                        tqdm.write(f"skipped: {image}", file=sys.stderr)
                        rows[path] = _failed(path, image)
                        continue
                    values, score = next(found)
                    name = names[path] if with_pictures else ""
                    rows[path] = _row(path, values, float(score), name)
                    if with_pictures:
                        stem = output / names[path]
                        jobs.append(pool.submit(_write_pictures, stem, image, values))
                for job in jobs:
                    job.result()
                write([rows[path] for path, _ in batch])
                bar.update(len(batch))
                if bar.disable and time.monotonic() - line > _SECONDS_PER_LINE:
                    line = time.monotonic()
                    count = sum(path in rows for path in missing)
                    left = (line - began) / count * (len(missing) - count)
                    logging.info("%d of %d images  ETA %s", count, len(missing), duration(left))
        finally:
            pool.shutdown(cancel_futures=True)
    table = [_public(rows[path], threshold) for path in names]
    results.write_file(output / "predictions.csv", _as_csv(table))
    results.write_file(output / "predictions.json", json.dumps(table, indent=2) + "\n")
    return table


def _read_ahead(
    pool: concurrent.futures.Executor, paths: list[pathlib.Path], size: int, white: int
) -> Iterator[list[tuple[pathlib.Path, np.ndarray | UserError]]]:
    """Lists of paths with their images or what is wrong; the next one is being read meanwhile."""

    def read(path):
        try:
            return path, images.read_array(path, white)
        except UserError as error:
            return path, error

    ahead = []
    for start in range(0, len(paths), size):
        following = [pool.submit(read, path) for path in paths[start : start + size]]
        if ahead:
            yield [job.result() for job in ahead]
        ahead = following
    if ahead:
        yield [job.result() for job in ahead]


def _write_pictures(stem: pathlib.Path, image: np.ndarray, values: np.ndarray) -> None:
    drawn = pictures.heat(values), pictures.overlay(image, values)
    for kind, picture in zip(_PICTURES, drawn):
        path = stem.with_name(f"{stem.name}_{kind}.png")
        pictures.save_png(path, Image.fromarray(picture), is_prediction=True)


# --- rows -----------------------------------------------------------------------------------------


def _key(path: pathlib.Path) -> tuple[str, int, int] | None:
    """What tells an image from others and from what its file was before."""
    try:
        status = path.stat()
    except OSError:
        return None
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def _has_pictures(row: Row, output: pathlib.Path, name: str) -> bool:
    """Whether an image's pictures are there, under the name that they are to have."""
    stem = output / name
    return row["pictures"] == name and all(
        stem.with_name(f"{stem.name}_{kind}.png").exists() for kind in _PICTURES
    )


def _row(path: pathlib.Path, values: np.ndarray, score: float, name: str) -> Row:
    """What is known of an image: the highest value of its map and where, its pictures' name."""
    row, column = divmod(int(values.argmax()), values.shape[1])
    figures = {"score": score, "highest": round(float(values.max()), 6)}
    place = {"row": row, "column": column}
    about = {"image": _text(path), "key": _key(path), "pictures": name}
    return about | figures | place | {"error": ""}


def _failed(path: pathlib.Path, error: UserError) -> Row:
    return {"image": _text(path), "error": str(error)}


def _text(path: pathlib.Path) -> str:
    """A path for the tables, which are UTF-8: other bytes are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _public(row: Row, threshold: float | None) -> Row:
    """A row of the tables."""
    verdict = ""
    if threshold is not None and not row["error"]:
        verdict = "anomalous" if row["score"] >= threshold else "normal"
    return {name: row.get(name, "") for name in FIELDS} | {"verdict": verdict}


def _made_by(detector: Detector) -> dict[str, Any]:
    """What tells a network's scores from another's."""
    config = json.loads(detector.config.to_json())
    return {"checkpoint": detector.digest, "score_pixels": config["score_pixels"]}


def _earlier(output: pathlib.Path, detector: Detector) -> dict[tuple[str, int, int], Row]:
    """Rows that an earlier call wrote and that still hold, by their images' keys."""
    rows: dict[tuple[str, int, int], Row] = {}
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
    if rows and made_by != _made_by(detector):
        logging.warning(
            "%s holds predictions of another checkpoint: they are replaced", shown(output)
        )
        return {}
    return rows


@contextlib.contextmanager
def _written(
    output: pathlib.Path,
    detector: Detector,
    earlier: Iterable[Row],
    chosen: Iterable[Row],
    threshold: float | None,
) -> Iterator:
    """Yields what writes rows as they come; both files begin with what was there before."""
    jsonl, table = output / "predictions.jsonl", output / "predictions.csv"
    lines = [_made_by(detector), *earlier]
    results.write_file(jsonl, "".join(_json_line(x) for x in lines))
    results.write_file(table, _as_csv([_public(row, threshold) for row in chosen]))
    with contextlib.ExitStack() as stack:
        files = []

        def write(rows: list[Row]) -> None:
            try:
                if not files:
                    files.extend(
                        stack.enter_context(path.open("a", encoding="utf-8", newline=""))
                        for path in (jsonl, table)
                    )
                texts = (
                    "".join(_json_line(x) for x in rows),
                    _as_csv([_public(row, threshold) for row in rows], header=False),
                )
                for file, text in zip(files, texts):
                    _append(file, text)
            except OSError as error:
                raise UserError(f"cannot write to {shown(output)}: {error.strerror}") from error

        yield write


def _append(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()


def _json_line(content: dict[str, Any]) -> str:
    return json.dumps(content) + "\n"  # ASCII: what is not text in a path stays escaped


def _as_csv(rows: Sequence[Row], header: bool = True) -> str:
    text = io.StringIO()
    # By itself Python 3.11 quotes a line feed in a name, but no carriage return.
    quoting = csv.QUOTE_ALL if any("\r" in row["image"] for row in rows) else csv.QUOTE_MINIMAL
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n", quoting=quoting)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summary(rows: Sequence[Row], seconds: float, output: pathlib.Path) -> str:
    """What was found, as one line."""
    counts = collections.Counter(row["verdict"] for row in rows if row["verdict"])
    errors = sum(bool(row["error"]) for row in rows)
    parts = [f"{count} {verdict}" for verdict, count in sorted(counts.items())]
    parts += [f"{errors} could not be read"] if errors else []
    return (
        f"{len(rows)} images in {duration(seconds)}: {', '.join(parts) or 'no verdicts'}; "
        f"{shown(output / 'predictions.csv')}"
    )
