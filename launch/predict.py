"""Says of new images whether they are anomalous, and where.

    python launch/predict.py --checkpoint=runs/mvtec/bottle --output=predictions IMAGES...

IMAGES are files, folders (searched recursively) or patterns in quotes. `--output` receives
predictions.csv and predictions.json, and per image a heat map and an overlay at its own size. A
file that cannot be read is reported, skipped, and makes the exit status 1.
"""

import collections
import concurrent.futures
import csv
import glob
import io
import json
import os
import pathlib
import sys
import time

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax import program  # noqa: E402

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "<workdir>/<category> of a training.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
OUTPUT = flags.DEFINE_string("output", "predictions", "Folder of what is written.")
THRESHOLD = flags.DEFINE_float(
    "threshold", None, "Score from which an image is anomalous; default: the checkpoint's."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images at a time.", lower_bound=1)
PICTURES = flags.DEFINE_bool("pictures", True, "Write heat maps and overlays.")
flags.mark_flags_as_required(["checkpoint"])

_FIELDS = ("image", "score", "verdict", "highest", "row", "column", "error")


def main(patterns: list[str]) -> None:
    """Predicts, batch by batch; images are read and pictures written by other threads."""
    from absl import logging
    from tqdm import tqdm

    from prn_jax import predict, results, thresholds
    from prn_jax.errors import UserError

    names = _find(patterns)
    output = pathlib.Path(OUTPUT.value).expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --output={OUTPUT.value}: {error.strerror}") from error
    detector = predict.load(CHECKPOINT.value, STEP.value)
    threshold = THRESHOLD.value
    if threshold is None and detector.thresholds:
        threshold = detector.thresholds["image"]
        logging.info("threshold %.4f (%s)", threshold, thresholds.describe(detector.thresholds))
    elif threshold is None:
        logging.warning("the checkpoint has no threshold: no verdicts; give --threshold")
    rows, began = [], time.monotonic()
    bar = tqdm(total=len(names), unit="image", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for batch in _read_ahead(pool, list(names), BATCH_SIZE.value):
            images = [image for _, image in batch if not isinstance(image, UserError)]
            maps, scores = detector(images, BATCH_SIZE.value)
            found = iter(zip(maps, scores))
            written = []
            for path, image in batch:
                bar.update()
                if isinstance(image, UserError):
                    rows.append(dict.fromkeys(_FIELDS, "") | {"image": path, "error": str(image)})
                    tqdm.write(f"skipped: {image}", file=sys.stderr)
                    continue
                values, score = next(found)
                rows.append(_row(path, values, float(score), threshold))
                if PICTURES.value:
                    stem = output / names[path]
                    written.append(pool.submit(_write_pictures, stem, image, values))
            for job in written:
                job.result()
    results.write_file(output / "predictions.csv", _as_csv(rows))
    results.write_file(output / "predictions.json", json.dumps(rows, indent=2) + "\n")
    _summary(rows, time.monotonic() - began, output)
    if any(row["error"] for row in rows):
        sys.exit(1)


def _find(patterns: list[str]) -> dict[str, str]:
    """Files, each with the name (without suffix) of its pictures below the output folder."""
    from prn_jax.errors import UserError
    from prn_jax.images import EXTENSIONS

    if not patterns:
        raise UserError("no images given: name files, folders or patterns after the flags")
    names, taken = {}, collections.Counter()
    for pattern in patterns:
        path = pathlib.Path(pattern).expanduser()
        if path.is_dir():
            found = sorted(x for x in path.rglob("*") if x.suffix.lower() in EXTENSIONS)
            relative = [x.relative_to(path) for x in found]
        elif path.exists():
            found, relative = [path], [pathlib.Path(path.name)]
        else:
            found = sorted(map(pathlib.Path, glob.glob(str(path), recursive=True)))
            relative = [pathlib.Path(x.name) for x in found]
        if not found:
            raise UserError(f"{pattern}: there are no images ({', '.join(EXTENSIONS)})")
        for file, name in zip(found, relative):
            if str(file) not in names:
                stem = str(name.with_suffix(""))
                taken[stem] += 1
                names[str(file)] = stem if taken[stem] == 1 else f"{stem}_{taken[stem]}"
    return names


def _read_ahead(pool, paths, size):
    """Lists of (path, uint8 [h, w, 3] or UserError), the next one being read meanwhile."""
    from prn_jax import images
    from prn_jax.errors import UserError

    def read(path):
        try:
            return path, images.read_array(pathlib.Path(path))
        except UserError as error:
            return path, error

    ahead = []
    for start in range(0, len(paths), size):
        following = [pool.submit(read, path) for path in paths[start : start + size]]
        if ahead:
            yield [job.result() for job in ahead]
        ahead = following
    yield [job.result() for job in ahead]


def _row(path, values, score, threshold) -> dict:
    """What the tables say of an image; the highest value of its map, and where."""
    row, column = divmod(int(values.argmax()), values.shape[1])
    verdict = ""
    if threshold is not None:
        verdict = "anomalous" if score >= threshold else "normal"
    figures = score, verdict, round(float(values.max()), 6), row, column, ""
    return dict(zip(_FIELDS, (path, *figures)))


def _write_pictures(stem, image, values) -> None:
    from PIL import Image

    from prn_jax import pictures

    for kind, picture in (
        ("heat", pictures.heat(values)),
        ("overlay", pictures.overlay(image, values)),
    ):
        path = stem.with_name(f"{stem.name}_{kind}.png")
        pictures.save_png(path, Image.fromarray(picture))


def _as_csv(rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _summary(rows, seconds, output) -> None:
    counts = collections.Counter(row["verdict"] for row in rows if not row["error"])
    errors = sum(bool(row["error"]) for row in rows)
    parts = [f"{count} {verdict}" for verdict, count in sorted(counts.items()) if verdict]
    parts += [f"{errors} could not be read"] if errors else []
    pace = (len(rows) - errors) / max(seconds, 1e-9)
    print(f"{len(rows)} images: {', '.join(parts) or 'no verdicts'}; {pace:.1f} images/s; "
          f"{output / 'predictions.csv'}", flush=True)  # fmt: skip


if __name__ == "__main__":
    program.run(main, positional=True)
