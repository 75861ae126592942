"""Files -> verdicts: a prediction over many files, its tables and pictures.

A row is written when its image is done: `predictions.csv` for people, and `predictions.jsonl` for
the next call, which goes on with what is missing. At the end `predictions.csv` and
`predictions.json` hold one row per image, in the order in which they were given.
"""

import collections
import concurrent.futures
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import logging
from PIL import Image
from tqdm import tqdm

from prn_jax import disk, evaluate, explain, images, pictures, tables
from prn_jax.checkpoints import check_outside
from prn_jax.errors import UserError, shown
from prn_jax.identity import LOCK
from prn_jax.predict import Detector, Inspection
from prn_jax.progress import duration
from prn_jax.tables import Asked, Row
from prn_jax.tiles import Tiling

_LONGEST_NAME = 200  # bytes; file systems take 255, with the ending of a picture and of a draft
_SECONDS_PER_LINE = 30.0


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
        path = pathlib.Path(os.path.expanduser(pattern))
        here = [path] if os.path.lexists(path) else [*map(pathlib.Path, _matching(path))]
        listed = [pair for x in here for pair in _listed(x, x == path, skipped)]
        own_here = sum(_is_own(file) for file, _ in listed)
        own += own_here
        # A shell's * names an earlier output folder and pictures too.
        if len(listed) == own_here and not own_here and not (path / tables.FILES[-1]).exists():
            if not here and not glob.has_magic(pattern):
                raise UserError(f"{shown(pattern)}: no such file or folder")
            raise UserError(f"{shown(pattern)}: there are no images{_left_out(skipped, own)}")
        for file, name in listed:
            if not _is_own(file):
                found.setdefault(os.path.abspath(file), (file, name))
    if not found:
        raise UserError(f"{shown(patterns[0])}: there are no images{_left_out(skipped, own)}")
    if foreign := [path for path in skipped if path.name not in (*tables.FILES, LOCK)]:
        logging.warning("skipped %s", images.describe_skipped(foreign))
    if own:
        logging.info("left out %d files of earlier predictions", own)
    names: dict[pathlib.Path, str] = {}
    taken: dict[str, int] = {}
    for file, name in found.values():
        names[file] = _free_name(name.with_suffix(""), taken)
    return names


def _left_out(skipped: list[pathlib.Path], own: int) -> str:
    about = f"; skipped {images.describe_skipped(skipped)}" if skipped else ""
    return about + (f"; left out {own} files of earlier predictions" if own else "")


def _is_own(path: pathlib.Path) -> bool:
    """Whether an earlier prediction wrote a file."""
    return path.name in tables.FILES or images.is_prediction(path)


def _is_mask(path: pathlib.Path) -> bool:
    """Whether a file of a product's folder is a mask or the region of interest."""
    if images.is_region(path):
        return (path.parent / "train").is_dir() or (path.parent / "test").is_dir()
    return any(x.name == "ground_truth" and (x.parent / "test").is_dir() for x in path.parents)


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
        masks = {x for x in files if _is_mask(x)}
        skipped += [*rest, *sorted(masks)]
        files = [x for x in files if x not in masks]
        return [(file, file.relative_to(path)) for file in files]
    if not is_named and not images.is_image(path):
        skipped.append(path)
        return []
    return [(path, pathlib.Path(path.name))]


def _free_name(name: pathlib.Path, taken: dict[str, int]) -> str:
    """A name that no other image's pictures have, and that is not too long.

    Args:
      name: that it should be.
      taken: the names so far, each with the number that was last put after it; gets this one.
    """
    stem = name.name
    if len(os.fsencode(stem)) > _LONGEST_NAME:
        digest = hashlib.sha256(os.fsencode(stem)).hexdigest()[:12]
        stem = f"{os.fsdecode(os.fsencode(stem)[: _LONGEST_NAME - 13])}-{digest}"
    first = chosen = str(name.with_name(stem))
    while chosen in taken:
        taken[first] += 1
        chosen = f"{first}_{taken[first]}"
    taken[chosen] = 1
    return chosen


# --- predicting -----------------------------------------------------------------------------------


def prepare(output: str | os.PathLike) -> pathlib.Path:
    """Makes the output folder.

    Raises:
      UserError: it cannot be made or written to, or has tables that no prediction wrote.
    """
    check_outside(output, "--output")
    if "://" in os.fspath(output):
        raise UserError(f"--output={shown(output)}: predictions are written to a local folder")
    folder = pathlib.Path(os.path.expanduser(output))
    tables.check_free(folder)
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
    asked: Asked,
    *,
    normals: explain.Normals | None = None,
    batch_size: int = 16,
) -> list[Row]:
    """Predicts files and writes tables and pictures; what an earlier call did is not done again.

    An image is done again where its file, the checkpoint or what is asked for has changed, and
    where it could not be read. Images are read and pictures written by other threads.

    Args:
      detector: from `prn_jax.load`.
      names: from `find`.
      output: from `prepare`.
      asked: what is asked for.
      normals: from `explain.read`, where it is asked for explanations.
      batch_size: images, or tiles, at a time.

    Returns:
      A row per image, in the order of `names`: `tables.FIELDS`.

    Raises:
      UserError: something cannot be written, or would replace what no prediction wrote.
    """
    _check_free(output, names.values(), asked)
    # It is of the last call that came to its end.
    (output / "predictions.json").unlink(missing_ok=True)
    done = tables.earlier(output, detector, asked)
    rows = {
        path: done[key] | {"image": tables.text(path)}
        for path, name in names.items()
        if (key := tables.key(path)) in done and tables.holds(done[key], output, name, asked)
    }
    if rows:
        logging.info("%d of %d images were done before", len(rows), len(names))
    missing = [path for path in names if path not in rows]
    if others := len({path for path, *_ in done} - {os.path.abspath(path) for path in names}):
        logging.warning(
            "%s had rows of %d images that are not among these: its tables lose them, its pictures "
            "stay; give each set of images an --output of its own", shown(output), others,
        )  # fmt: skip
    before = {(key, row["pictures"]): row for key, row in done.items()}
    with_files = bool(asked.pictures or asked.maps or asked.explain)
    if with_files:  # Whose files are overwritten now is done again when it is asked for.
        taken = {names[path] for path in missing}
        done = {key: row for key, row in done.items() if row["pictures"] not in taken}
    # The last batch and one with unreadable files are filled up: no other size is compiled.
    places = Tiling.of(detector.config).count
    size = evaluate.fixed_size(len(missing), max(1, batch_size // places), detector.mesh)
    tiles = min(size * places, max(size, batch_size))
    bar = tqdm(
        total=len(missing), unit="image", disable=not sys.stderr.isatty(), dynamic_ncols=True
    )
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    line = began = time.monotonic()
    with tables.written(output, detector, done.values(), rows.values(), asked) as write, bar:
        try:
            for batch in _read_ahead(pool, missing, size, detector.white_level):
                readable = [image for *_, image in batch if not isinstance(image, UserError)]
                found = map(Inspection, *detector.inspect(readable, tiles, fill=True))
                jobs, alarms = [], []
                for path, key, image in batch:
                    if isinstance(image, UserError):
                        tqdm.write(f"skipped: {image}", file=sys.stderr)
                        rows[path] = tables.failed(path, image)
                        continue
                    one = next(found)
                    name = names[path] if with_files else ""
                    rows[path], mask = tables.make(path, key, one, name, asked)
                    old = before.get((key, name), {})
                    rows[path]["files"] += old.get("files", [])
                    if "nearest" in old:
                        rows[path]["nearest"] = old["nearest"]
                    seen = _Seen(output / names[path], image, one, mask)
                    jobs.append(pool.submit(_write_files, seen, asked))
                    if asked.explain and asked.alarms(rows[path]):
                        alarms.append((path, seen))
                if alarms:
                    nearest = explain.explain(detector, normals, [x.image for _, x in alarms])
                    for (path, seen), (id_, normal) in zip(alarms, nearest):
                        rows[path]["nearest"] = id_
                        jobs.append(pool.submit(_write_why, seen, id_, normal))
                for job in jobs:
                    job.result()
                write([rows[path] for path, *_ in batch])
                bar.update(len(batch))
                if bar.disable and time.monotonic() - line > _SECONDS_PER_LINE:
                    line = time.monotonic()
                    count = sum(path in rows for path in missing)
                    left = (line - began) / count * (len(missing) - count)
                    logging.info("%d of %d images  ETA %s", count, len(missing), duration(left))
        finally:
            pool.shutdown(cancel_futures=True)
    table = [tables.public(rows[path], asked) for path in names]
    disk.write_file(output / "predictions.csv", tables.as_csv(table))
    disk.write_file(output / "predictions.json", json.dumps(table, indent=2) + "\n")
    return table


def _read_ahead(
    pool: concurrent.futures.Executor, paths: list[pathlib.Path], size: int, white: int
) -> Iterator[list[tuple[pathlib.Path, tables.Key | None, np.ndarray | UserError]]]:
    """Lists of paths, keys, and images or what is wrong; the next one is being read meanwhile."""

    def read(path):
        key = tables.key(path)
        try:
            return path, key, images.read_array(path, white)
        except UserError as error:
            return path, key, error

    ahead = []
    for start in range(0, len(paths), size):
        following = [pool.submit(read, path) for path in paths[start : start + size]]
        if ahead:
            yield [job.result() for job in ahead]
        ahead = following
    if ahead:
        yield [job.result() for job in ahead]


@dataclasses.dataclass(frozen=True)
class _Seen:
    """An image, what was found in it, and where its files go."""

    stem: pathlib.Path
    image: np.ndarray
    found: Inspection
    mask: np.ndarray

    def overlay(self) -> np.ndarray:
        return pictures.outline(pictures.overlay(self.image, self.found.map), self.mask)

    def write(self, ending: str, picture: Image.Image) -> None:
        pictures.save_png(tables.beside(self.stem, ending), picture, is_prediction=True)


def _write_files(seen: _Seen, asked: Asked) -> None:
    if asked.pictures:
        seen.write("_heat.png", Image.fromarray(pictures.heat(seen.found.map)))
        seen.write("_overlay.png", Image.fromarray(seen.overlay()))
        if asked.pixel_threshold is not None:
            seen.write("_mask.png", Image.fromarray(np.uint8(255 * seen.mask)))
    if asked.maps:
        pictures.save_map(tables.beside(seen.stem, tables.MAPS[asked.maps]), seen.found.map)


def _write_why(seen: _Seen, nearest: str, normal: np.ndarray) -> None:
    """The image, its map, and the normal image that is most like it, side by side."""
    cells = [
        (pictures.outline(seen.image, seen.mask), seen.stem.name),
        (seen.overlay(), f"score {seen.found.score:.3f}"),
        (normal, nearest),
    ]
    title = f"distance {seen.found.distance:.2f}; right: the most alike of the normal images"
    seen.write("_why.png", pictures.contact_sheet([(title, cells)], cell=320))


def _check_free(output: pathlib.Path, names: Iterable[str], asked: Asked) -> None:
    """Refuses to replace what no prediction wrote; a .npy file says nothing of who wrote it."""
    was_here = tables.is_earlier(output)
    for name in names:
        for path in (tables.beside(output / name, x) for x in asked.every_file()):
            is_own = was_here if path.suffix == ".npy" else images.is_prediction(path)
            if path.exists() and path.stat().st_size and not is_own:
                raise tables.in_the_way(path)


def summary(rows: Sequence[Row], seconds: float, output: pathlib.Path) -> str:
    """What was found, as one line."""
    counts = collections.Counter(row["verdict"] for row in rows if row["verdict"])
    errors = sum(bool(row["error"]) for row in rows)
    unfamiliar = sum(row["unfamiliar"] == "yes" for row in rows)
    parts = [f"{count} {verdict}" for verdict, count in sorted(counts.items())]
    parts += [f"{unfamiliar} unfamiliar (not the product, or the light has changed)"] * (
        unfamiliar > 0
    )
    parts += [f"{errors} could not be read"] if errors else []
    return (
        f"{len(rows)} images in {duration(seconds)}: {', '.join(parts) or 'no verdicts'}; "
        f"{shown(output / 'predictions.csv')}"
    )
