"""A trained network as a file that other runtimes execute: one module per format.

All take `image`, uint8 [b, h, w, 3] at the camera's size, and give `map`, float32 [b, h, w] at the
network's, and `score`, float32 [b], both in [0, 1], and `distance`, float32 [b], see
`models.whole`; the resize that training uses and the normalisation are inside. Beside each lie its
description, `NAME.json`, and a golden set, `NAME.golden`; `place` says what may be replaced,
`check` what is accepted.
"""

import dataclasses
import importlib.util
import os
import pathlib
import tempfile
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from prn_jax import images, results
from prn_jax.checkpoints import check_outside
from prn_jax.errors import UserError, shown
from prn_jax.export import check, graph, onnx, openvino, place, savedmodel, stablehlo
from prn_jax.predict import Detector, say_type
from prn_jax.splits import Images

FORMATS: dict[str, ModuleType] = {
    "stablehlo": stablehlo,
    "savedmodel": savedmodel,
    "onnx": onnx,
    "openvino": openvino,
}
# What files of a format are called, by people too.
_ENDINGS = {".onnx": "onnx", ".xml": "openvino", ".pb": "savedmodel"}
# Formats that have an option. OpenVINO 2026.4 does not read the 8-bit model.
_WITH = {"int8": ("onnx",), "opset": ("onnx", "openvino")}


@dataclasses.dataclass(frozen=True)
class Checked:
    """What the comparison of an export with its checkpoint gave.

    Attributes:
      images: compared.
      map_difference: largest, of any pixel.
      score_difference: largest.
      distance_difference: largest; relative where the distance is above 1.
      verdicts: how many differ at the checkpoint's threshold; None where it has none.
      images_per_s: of the export, in its own runtime, after its first batch.
      checkpoint_images_per_s: of the checkpoint through JAX at the network's size, likewise.
      figures: of an export that is rounded on purpose: see `check.judge`; else empty.
    """

    images: int
    map_difference: float
    score_difference: float
    distance_difference: float
    verdicts: int | None
    images_per_s: float
    checkpoint_images_per_s: float
    figures: dict[str, tuple[float, float]]


def is_exact(kind: str, int8: bool = False) -> bool:
    """Whether a format gives the checkpoint's values, or is rounded and judged by metrics."""
    return FORMATS[kind].IS_EXACT and not int8


def export(
    detector: Detector,
    kind: str,
    path: str | os.PathLike,
    files: Sequence[bytes],
    *,
    input_size: graph.Size | None = None,
    batch_size: int = 0,
    opset: int | None = None,
    calibration: np.ndarray | None = None,
    split: Images | None = None,
) -> Checked:
    """Writes an export, after it was run and compared with the checkpoint.

    Args:
      detector: from `prn_jax.load`.
      kind: one of `FORMATS`.
      path: the file; of a SavedModel and of OpenVINO the folder. Only an earlier export of the same
        format is replaced.
      files: to compare on: PNG or JPEG at `input_size`; at least one.
      input_size: (height, width) of the images that the export takes; default: the network's own.
      batch_size: that the export takes; 0 for any.
      opset: of ONNX; default: jax2onnx's.
      calibration: uint8 [n, h, w, 3] at the network's size, to make 8-bit convolutions by.
      split: by which a rounded export is judged; needed where `is_exact` is false.

    Raises:
      UserError: something else lies at `path`, a package is missing, or the export is not accepted
        (see `check`); nothing is left at `path` that was not there before.
    """
    path = prepare(kind, path, calibration is not None, opset)
    runtime, exact = FORMATS[kind], is_exact(kind, calibration is not None)
    if not exact and not len(split.image):
        raise check.unjudged(kind)
    if not files:
        raise UserError("the training had no test images to compare on: give --images=FOLDER")
    if detector.model.dtype != np.float32:  # `load` said it of its own type
        say_type(detector.thresholds, np.float32)
    about = _about(detector, kind, input_size, batch_size, calibration is not None)
    made_of = graph.make(
        detector, about, input_size, batch_size, opset, calibration, runtime.UNFUSED
    )
    batch = batch_size or min(16, len(files))
    compute = graph.make(detector, about).compute  # as prediction does
    small = check.shrunk(made_of, files)
    checkpoint = check.run_checkpoint(compute, small, batch)
    expected, of, figures = checkpoint, "the checkpoint", {}
    # In a folder of the system's, whose name every library can write to; `path` has any name.
    with tempfile.TemporaryDirectory() as folder:
        made, golden = pathlib.Path(folder) / "export", pathlib.Path(folder) / "golden"
        if exact:
            runtime.write(made_of, made)
        else:
            alone = pathlib.Path(folder) / "alone"
            runtime.write(made_of, made, alone)
            pngs = [images.encode_png(x) for x in (*split.image, *small)]
            found = check.run(kind, runtime, alone, pngs, batch)
            tested, expected = found.split(len(split.image))
            own = check.run_checkpoint(compute, split.image, batch)
            figures = check.judge(kind, split, tested, own)
            of = "the same network without its resize"
        found = check.run(kind, runtime, made, files, batch)
        check.require_same(kind, found, expected, of)
        chosen = detector.thresholds or {}
        threshold = chosen.get("image")
        limits = {"score": threshold, "distance": chosen.get("distance")}
        check.write_golden(golden, files, found, limits)
        place.put(made, golden, path, kind, about | {"judged": figures})
    verdicts = None
    if threshold is not None:
        verdicts = int(np.sum((found.scores >= threshold) != (checkpoint.scores >= threshold)))
    return Checked(
        len(files), *found.differences(checkpoint), verdicts, found.images_per_s,
        checkpoint.images_per_s, figures,
    )  # fmt: skip


def prepare(
    kind: str, path: str | os.PathLike, int8: bool = False, opset: int | None = None
) -> pathlib.Path:
    """Refuses, before anything is computed, what could not be written in the end.

    Returns:
      `path`, absolute.

    Raises:
      UserError: something else lies at `path`, it is among a run's checkpoints or cannot be
        written to, a package is missing, or the format has no such option.
    """
    for name, given in (("int8", int8), ("opset", opset is not None)):
        if given and kind not in _WITH[name]:
            raise UserError(f"--{name} is for --format={' or '.join(_WITH[name])}, not for {kind}")
    path = place.resolve(path)
    if (meant := _ENDINGS.get(path.suffix.lower(), kind)) != kind:
        raise UserError(
            f"--output={shown(path)} is called as --format={meant} is, but the format is {kind}: "
            "give that format, or another name"
        )
    check_outside(path, "--output")
    place.check(path, kind)
    with place.staged(path):
        pass
    missing = [name for name in FORMATS[kind].NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format={kind} needs {' and '.join(missing)}: run pip install -e '.[export]' in the "
            "folder of the source tree"
        )
    return path


def _about(
    detector: Detector, kind: str, given: graph.Size | None, batch_size: int, int8: bool
) -> dict[str, Any]:
    """What the user of an export has to know: plain JSON types."""
    provenance = results.provenance()
    versions = provenance["versions"]
    needed = [name for name in FORMATS[kind].NEEDS if name not in versions]
    size, many = list(detector.image_size), batch_size or "any"
    exact = is_exact(kind, int8)
    return {
        "category": detector.config.category,
        "step": detector.step,
        "input": {"name": "image", "type": "uint8", "channels": "RGB", "white_level": 255,
                  "shape": [many, *(given or size), 3],
                  "white_level_of_files": detector.white_level or 255},
        "network_size": size,
        "outputs": {"map": ["float32", many, *size], "score": ["float32", many],
                    "distance": ["float32", many]},
        "rounded": None if exact else "8-bit convolutions" if int8 else "float16 weights",
        "thresholds": detector.thresholds,
        "git": provenance["git"],
        "versions": versions | {name: results.version(name) for name in needed},
    }  # fmt: skip
