"""Whether an export computes what its checkpoint does: from image files, without this package.

An export runs in a process of its own, in its own runtime, on files that it opens itself. Exact
formats must agree with the checkpoint within `TOLERANCE`. What is rounded on purpose (8 bits,
float16 weights) is judged by metrics on the test split: it may lose `MOST_LOST` of each.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from prn_jax import images, metrics, results
from prn_jax.errors import UserError, shown, shown_first
from prn_jax.export.graph import Graph, Size
from prn_jax.splits import Images

TOLERANCE = 1e-4
MOST_LOST = 0.005  # of image AUROC and of pixel AP
_ENLARGED = 16  # test images that are enlarged to a camera's size, at most

# Arguments: the export, the folder of images, the .npz to write, images at a time.
_BEFORE = """
import os, sys, time
import numpy as np
from PIL import Image, PngImagePlugin
Image.MAX_IMAGE_PIXELS = None  # as `images` has them
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30
path, folder, output, size = *sys.argv[1:4], int(sys.argv[4])
"""
_AFTER = """
def read(name):
    with Image.open(os.path.join(folder, name)) as image:
        return np.asarray(image.convert("RGB"))
def once(names):
    batch = np.stack([read(name) for name in names])
    began = time.perf_counter()
    outputs = [np.asarray(x) for x in run(batch)]
    return *outputs, time.perf_counter() - began
names = sorted(os.listdir(folder))
count = len(names)
# The last ones are filled up with the first ones.
names = [names[i % count] for i in range(-(-count // size) * size)]
parts = [names[i : i + size] for i in range(0, len(names), size)]
once(parts[0])
*found, seconds = zip(*map(once, parts))
assert "prn_jax" not in sys.modules
found = {str(i): np.concatenate(x)[:count] for i, x in enumerate(found)}
peak = np.nan
if os.path.exists("/proc/self/status"):  # what getrusage says is the parent's, if that had more
    with open("/proc/self/status") as file:
        held = (int(x.split()[1]) * 1.024e-3 for x in file if x.startswith("VmHWM"))
        peak = next(held, np.nan)
np.savez(output, **found, images_per_s=len(names) / sum(seconds), memory_mb=peak)
"""


@dataclasses.dataclass(frozen=True)
class Results:
    """What a runtime gave, and what it took.

    Attributes:
      maps: float32 [n, h, w].
      scores: float32 [n].
      distances: float32 [n].
      images_per_s: without reading the files, after the first batch.
      memory_mb: the most that its process had; nan where the system does not tell, or where the
        process does other work.
    """

    maps: np.ndarray
    scores: np.ndarray
    distances: np.ndarray
    images_per_s: float
    memory_mb: float = np.nan

    def differences(self, other: "Results") -> tuple[float, float, float]:
        """The largest of any pixel, score and distance; infinite where shapes differ.

        That of distances, which are as large as the images are strange, is relative where above 1.
        """
        near = np.maximum(1.0, np.abs(other.distances))
        pairs = (
            (self.maps, other.maps),
            (self.scores, other.scores),
            (self.distances / near, other.distances / near),
        )
        return tuple(float(np.abs(a - b).max()) if a.shape == b.shape else np.inf for a, b in pairs)

    def split(self, count: int) -> tuple["Results", "Results"]:
        """Of the first `count` images, and of the others."""
        return tuple(
            dataclasses.replace(
                self, maps=self.maps[x], scores=self.scores[x], distances=self.distances[x]
            )
            for x in (slice(count), slice(count, None))
        )


# --- images ---------------------------------------------------------------------------------------


def read_folder(folder: pathlib.Path, given: Size, white: int) -> list[bytes]:
    """Image files at the size that an export takes.

    Args:
      folder: images of any kind, also in its subfolders.
      given: (height, width); others are resized to it, and a warning says so.
      white: see `images.to_uint8`.

    Returns:
      PNG or JPEG files that any reader decodes alike.

    Raises:
      UserError: there are none, or one cannot be read.
    """
    paths, skipped = images.find_images(folder)
    if skipped:
        logging.warning("--images: not used: %s", images.describe_skipped(skipped))
    if not paths:
        raise UserError(f"--images={shown(folder)}: no such folder, or no images in it")
    found, resized = [], []
    for path in paths:
        data, size = images.read_image(path, white)
        if size != tuple(given):
            resized.append(path)
            data = images.encode_png(images.resize(images.decode(data), given))
        found.append(data)
    if resized:
        logging.warning(
            "--images: %d of %d are not %dx%d (height x width), as the export takes them, and are "
            "resized before: %s", len(resized), len(paths), *given, shown_first(resized),
        )  # fmt: skip
    return found


def run_folder(checkpoint: str | os.PathLike) -> epath.Path:
    """`<workdir>/<category>` of a checkpoint that is given by it or by `checkpoints` in it."""
    text = os.fspath(checkpoint)
    folder = epath.Path(text if "://" in text else os.path.realpath(os.path.expanduser(text)))
    return folder.parent if folder.name == "checkpoints" else folder


def read_run(folder: str | os.PathLike) -> Images:
    """The test images of a training.

    Args:
      folder: `<workdir>/<category>`, or `checkpoints` in it; local or of a bucket.

    Raises:
      UserError: the run has none.
    """
    folder = run_folder(folder)
    if not (folder / "predictions.npz").exists():
        raise UserError(
            f"no test images of the training in {shown(folder)}: exact formats are compared on a "
            "folder of images, --images; others need the test split"
        )
    return results.read_predictions(folder)[0]


def enlarged(split: Images, given: Size) -> list[bytes]:
    """Test images as files at a camera's size; where that is another, some of them."""
    chosen = np.arange(len(split.image))
    if given != split.image.shape[1:3] and len(chosen) > _ENLARGED:
        chosen = np.linspace(0, len(chosen) - 1, _ENLARGED).round().astype(int)
    return [images.encode_png(images.resize(split.image[i], given)) for i in chosen]


# --- running --------------------------------------------------------------------------------------


def run(
    kind: str, runtime: ModuleType, path: pathlib.Path, files: Sequence[bytes], batch: int
) -> Results:
    """Runs an export on image files in a fresh process.

    Args:
      kind: the format, for messages.
      runtime: its module.
      path: the export.
      files: PNG or JPEG, all of the size that it takes.
      batch: images at a time.

    Raises:
      UserError: it does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, found = pathlib.Path(folder) / "images", pathlib.Path(folder) / "found.npz"
        given.mkdir()
        for i, data in enumerate(files):
            (given / f"{i:06d}").write_bytes(data)
        code = _BEFORE + runtime.RUNNER + _AFTER
        # Away from the source tree, so that it cannot import this package by chance.
        result = subprocess.run(
            [sys.executable, "-c", code, str(path.resolve()), str(given), str(found), str(batch)],
            cwd=folder,
            env=os.environ
            | {
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "PYTHONPATH": "",
                "JAX_PLATFORMS": "cpu",
                "JAX_TRACEBACK_FILTERING": "off",  # its note of that would be the last line
            },
            capture_output=True,
            text=True,
        )
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            if result.returncode < 0:  # by the system, where there is no memory left
                last = f"signal {-result.returncode} ended it; was there memory enough?"
            raise UserError(f"the {kind} export does not run in its own runtime: {last}")
        with np.load(found) as stored:
            figures = (float(stored[x]) for x in ("images_per_s", "memory_mb"))
            return Results(*(stored[x] for x in "012"), *figures)


def run_checkpoint(compute: Callable, pixels: Sequence[np.ndarray], batch: int) -> Results:
    """The checkpoint's own results, of images uint8 [h, w, 3] at the network's size."""
    step = jax.jit(compute)
    stacked = [pixels[i % len(pixels)] for i in range(-(-len(pixels) // batch) * batch)]
    parts = [np.stack(stacked[i : i + batch]) for i in range(0, len(stacked), batch)]
    jax.block_until_ready(step(parts[0]))
    began = time.perf_counter()
    found = [[np.asarray(x) for x in step(part)] for part in parts]
    seconds = time.perf_counter() - began
    found = (np.concatenate(x)[: len(pixels)] for x in zip(*found))
    return Results(*found, len(stacked) / seconds)


def shrunk(graph: Graph, files: Sequence[bytes]) -> list[np.ndarray]:
    """What training would make of the files: uint8 [h, w, 3] at the network's size."""
    return [images.resize(images.decode(data), graph.size) for data in files]


def require_same(kind: str, found: Results, expected: Results, of: str) -> None:
    """Refuses an export whose results are others.

    Raises:
      UserError: any value differs by more than `TOLERANCE`.
    """
    largest = max(found.differences(expected))
    if not largest <= TOLERANCE:
        raise UserError(
            f"the {kind} export differs from {of} by {largest:.2g}, more than {TOLERANCE:g}: "
            "nothing was written"
        )


def judge(
    kind: str, split: Images, found: Results, expected: Results
) -> dict[str, tuple[float, float]]:
    """Accepts an export that is rounded on purpose by what it is worth on the test split.

    Returns:
      By metric, `image_auroc` and `pixel_ap`: the checkpoint's and the export's, in [0, 1]; those
      that the split leaves undefined are left out.

    Raises:
      UserError: one is lower by more than `MOST_LOST`, or none is defined.
    """
    before, after = _figures(split, expected), _figures(split, found)
    figures = {k: (v, after[k]) for k, v in before.items() if v is not None}
    if not figures:
        raise unjudged(kind)
    if any(old - new > MOST_LOST for old, new in figures.values()):
        raise UserError(
            f"the {kind} export loses more than {100 * MOST_LOST:.1f} points: "
            f"{describe(figures)}: nothing was written"
        )
    return figures


def _figures(split: Images, found: Results) -> dict[str, float | None]:
    """Image AUROC and pixel AP; anomalous images without a mask count for the first alone."""
    pixels = metrics.rank_pixels(found.maps, split.mask, known=split.has_mask)
    return {
        "image_auroc": metrics.auroc(metrics.rank_images(found.scores, split.label)),
        "pixel_ap": metrics.average_precision(pixels),
    }


def unjudged(kind: str) -> UserError:
    """The error of a rounded export that nothing can be said of."""
    return UserError(
        f"the {kind} export is rounded, and is judged on the test split, which lacks normal or "
        "anomalous images: take a format that is exact, or leave out --int8"
    )


def describe(figures: dict[str, tuple[float, float]]) -> str:
    """Metrics before and after, in percent, as one line."""
    return ", ".join(
        f"{results.COLUMNS[k]} {100 * old:.2f} before, {100 * new:.2f} after"
        for k, (old, new) in figures.items()
    )


# --- for those who integrate it -------------------------------------------------------------------


def write_golden(
    folder: pathlib.Path,
    files: Sequence[bytes],
    found: Results,
    thresholds: dict[str, float | None],
) -> None:
    """Writes images and what the export makes of them, for integration in another language.

    The images of the lowest, the middle and the highest score: `0.png`, RGB at the size that the
    export takes; `0.npy`, its map; `expected.json`, scores, distances and verdicts.

    Args:
      folder: is made.
      files: PNG or JPEG.
      found: of them.
      thresholds: of the `score` and the `distance`, from which there is an alarm; None: no verdict.
    """
    folder.mkdir()
    order = np.argsort(found.scores, kind="stable")
    chosen = sorted({0, (len(order) - 1) // 2, len(order) - 1})
    rows: list[dict[str, Any]] = []
    for i, number in enumerate(order[chosen]):
        (folder / f"{i}.png").write_bytes(images.encode_png(images.decode(files[number])))
        np.save(folder / f"{i}.npy", found.maps[number].astype(np.float32))
        score, distance = float(found.scores[number]), float(found.distances[number])
        row = {"image": f"{i}.png", "map": f"{i}.npy", "score": score, "distance": distance}
        if thresholds["score"] is not None:
            row["verdict"] = "anomalous" if score >= thresholds["score"] else "normal"
        if thresholds["distance"] is not None:
            row["unfamiliar"] = "yes" if distance >= thresholds["distance"] else "no"
        rows.append(row)
    expected = {"tolerance": TOLERANCE, "thresholds": thresholds, "images": rows}
    (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")
