"""Prediction over many machines by Ray Data: files in, Parquet out. Needs the extra `ray`.

    from prn_jax import ray_data

    ray_data.predict_files(paths, "runs/bolts/bolt", "/shared/scores", workers=16, gpus=1)

One detector per worker, each on the devices that Ray gives it. Rows are written as blocks of files
are done; the same call goes on with what is missing.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from prn_jax import images
from prn_jax.errors import UserError, shown
from prn_jax.predict import load
from prn_jax.program import leave_convs_to_eigen

_BATCHES_PER_BLOCK = 8  # what is lost when a worker is


class _Worker:
    """Holds a detector, and turns a batch of files' paths into rows."""

    def __init__(self, checkpoint: str, batch_size: int, gpus: float):
        if 0 < gpus < 1:  # another process has the rest
            os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * gpus:.3f}"
        leave_convs_to_eigen()
        self._detector, self._batch_size = load(checkpoint), batch_size

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = [self._read(path) for path in batch["path"]]
        arrays = [row.pop("pixels") for row in rows if not row["error"]]
        found = iter(zip(*self._detector.inspect(arrays, self._batch_size, fill=True)))
        for row in rows:
            nothing = np.zeros((1, 1)), np.nan, np.nan
            values, score, distance = nothing if row["error"] else next(found)
            place = divmod(int(values.argmax()), values.shape[1])
            row |= {"score": float(score), "distance": float(distance)}
            row |= {"highest": float(values.max())}
            row |= {"row": place[0], "column": place[1], "checkpoint": self._detector.digest}
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def _read(self, path: str) -> dict[str, Any]:
        size, modified = _state(path)
        row = {"image": path, "bytes": size, "modified": modified, "error": ""}
        try:
            pixels = images.read_array(pathlib.Path(path), self._detector.white_level)
        except UserError as error:
            return row | {"error": str(error)}
        return row | {"pixels": pixels}


def _digest(checkpoint: str) -> tuple[str, str]:
    """A checkpoint's digest, or what is wrong with it; in a process that ends, and frees a GPU."""
    try:
        return load(checkpoint).digest, ""
    except UserError as error:
        return "", str(error)


def predict_files(
    paths: Sequence[str | os.PathLike],
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    workers: int = 1,
    batch_size: int = 16,
    gpus: float = 0,
    cpus: float = 1,
) -> int:
    """Predicts files and writes a row for each.

    A file is done again where it changed, where it could not be read, and where an earlier row is
    of another checkpoint. Earlier rows stay: those count that are without `error`, whose
    `checkpoint` is `load(checkpoint).digest`, and whose `bytes` and `modified` are the file's now.

    Args:
      paths: of the files, which every worker reaches by them.
      checkpoint: `<workdir>/<category>`, likewise.
      output: a folder, likewise; gets Parquet files with `image`, `score` in [0, 1] and
        `distance` (NaN where there is none), the map's `highest` value with its `row` and
        `column`, `error`, `bytes` and `modified` (nanoseconds) of the file, and the `checkpoint`'s
        digest.
      workers: detectors at a time.
      batch_size: images at a time of each.
      gpus: of each.
      cpus: of each.

    Returns:
      How many files were predicted now.

    Raises:
      UserError: Ray is not installed, there is no such checkpoint, a path is a bucket's, or
        `output` holds something else.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("Ray is not installed: pip install 'prn-jax[ray]'") from error
    for path in (output, *paths):
        if "://" in os.fspath(path):
            raise UserError(f"{shown(path)}: give paths of a file system that every worker mounts")
    checkpoint, output = os.fspath(checkpoint), os.path.abspath(os.path.expanduser(output))
    if "://" not in checkpoint:
        checkpoint = os.path.abspath(os.path.expanduser(checkpoint))
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1)(_digest)
    digest, wrong = ray.get(task.remote(checkpoint))
    if wrong:
        raise UserError(wrong)
    done = _done(output, digest)
    files = list(dict.fromkeys(os.path.abspath(os.path.expanduser(path)) for path in paths))
    missing = [path for path in files if (path, *_state(path)) not in done]
    if len(missing) < len(files):
        logging.info("%d of %d images were done before", len(files) - len(missing), len(files))
    if not missing:
        return 0
    workers = min(workers, len(missing))
    blocks = max(workers, len(missing) // (batch_size * _BATCHES_PER_BLOCK))
    rows = ray.data.from_items(
        [{"path": path} for path in missing], override_num_blocks=blocks
    ).map_batches(
        _Worker,
        fn_constructor_args=(checkpoint, batch_size, gpus),
        batch_size=batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus,
        num_cpus=cpus,
    )
    # Writing needs no core of its own: the workers may hold all that there are.
    rows.write_parquet(output, ray_remote_args={"num_cpus": 0})
    return len(missing)


def _state(path: str) -> tuple[int, int]:
    """Size in bytes and time of change; zeros where there is no file, which its reader says."""
    return (images.state(path) or (0, 0, 0))[:2]


def _done(output: str, digest: str) -> set[tuple[str, int, int]]:
    """The paths and states of the files that have a row already."""
    import pyarrow
    from pyarrow import parquet

    done = set()
    fields = ["image", "bytes", "modified", "error", "checkpoint"]
    for path in sorted(pathlib.Path(output).glob("[!._]*")):
        try:
            rows = parquet.read_table(path, columns=fields).to_pylist()
            done |= {
                (row["image"], row["bytes"], row["modified"])
                for row in rows
                if row["checkpoint"] == digest and not row["error"]
            }
        except (pyarrow.ArrowException, KeyError, OSError) as error:
            if path.suffix == ".parquet" and isinstance(error, pyarrow.ArrowInvalid):
                logging.warning(
                    "%s is damaged, by a worker that was killed while it wrote: its images are "
                    "done again; remove it before you read the folder", shown(path),
                )  # fmt: skip
                continue
            raise UserError(
                f"{shown(output)} holds something else than earlier rows: give another folder"
            ) from error
    return done
