"""A trained network as a file that other runtimes execute: StableHLO, SavedModel, ONNX.

All take `image`, uint8 [b, h, w, 3] at the network's size, and give `map`, float32 [b, h, w], and
`score`, float32 [b], both in [0, 1]; normalisation is inside. Compute type: float32. Beside each
lies its description, `NAME.json`; `place` says what may be replaced.
"""

import dataclasses
import importlib.util
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prn_jax import evaluate, results
from prn_jax.checkpoints import check_outside
from prn_jax.errors import UserError
from prn_jax.export import place
from prn_jax.predict import Detector

FORMATS = ("stablehlo", "savedmodel", "onnx")
TOLERANCE = 1e-4
# TensorFlow's copy of StableHLO is older than JAX's: what twelve weeks ago was current.
_TENSORFLOW_AGE = "WEEK_12"

# Each runs an exported network in a process that knows nothing of this package. Arguments: the
# export, the images' .npy, the .npz to write.
_RUNNERS = {
    "stablehlo": """
import sys, time, pathlib, numpy as np
from jax import export
run = export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes())).call
import jax
run = jax.jit(run)
""",
    "savedmodel": """
import sys, time, numpy as np, tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
serve = model.signatures["serving_default"]
def run(image):
    found = serve(image=tf.constant(image))
    return found["map"], found["score"]
""",
    "onnx": """
import sys, time, numpy as np, onnxruntime
onnxruntime.set_default_logger_severity(3)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
def run(image):
    return session.run(["map", "score"], {"image": image})
""",
}
_RUN = """
images, size = np.load(sys.argv[2]), int(sys.argv[4])
count = len(images)
# The last ones are filled up with the first ones.
images = images[np.arange(-(-count // size) * size) % count]
parts = [images[i : i + size] for i in range(0, len(images), size)]
once = lambda: [[np.asarray(x) for x in run(part)] for part in parts]
found = once()
began = time.perf_counter()
once()
seconds = time.perf_counter() - began
maps, scores = (np.concatenate(x)[:count] for x in zip(*found))
np.savez(sys.argv[3], map=maps, score=scores, seconds=seconds)
"""


@dataclasses.dataclass(frozen=True)
class Checked:
    """What the comparison of an export with its checkpoint gave.

    Attributes:
      images: compared.
      map_difference: largest, of any pixel.
      score_difference: largest.
      images_per_s: of the export, in its own runtime, after its first run.
      checkpoint_images_per_s: of the checkpoint through JAX, likewise.
    """

    images: int
    map_difference: float
    score_difference: float
    images_per_s: float
    checkpoint_images_per_s: float


def export(
    detector: Detector, kind: str, path: str | os.PathLike, images: np.ndarray, batch_size: int = 0
) -> Checked:
    """Writes an export, after it was run and compared with the checkpoint.

    Args:
      detector: from `prn_jax.load`.
      kind: one of `FORMATS`.
      path: the file, of a SavedModel the folder; only an earlier export of the same format is
        replaced. `<path>.json` describes it.
      images: to compare on, uint8 [n, h, w, 3] at the network's size; at least one.
      batch_size: that the export takes; 0 for any.

    Raises:
      UserError: something else lies at `path`, a package is missing, or the export differs by
        more than `TOLERANCE`; nothing is left at `path` that was not there before.
    """
    path = prepare(kind, path)
    model = detector.model.clone(dtype=jnp.float32)
    variables = jax.tree.map(jnp.asarray, jax.device_get(detector.variables))
    pixels = detector.config.score_pixels

    def compute_map(image):
        return jax.nn.sigmoid(model.apply(variables, image))

    def compute(image):
        maps = compute_map(image)
        return maps, evaluate.image_score(maps, pixels)

    if not len(images):
        raise UserError("no images to compare on")
    batch = batch_size or jax.export.symbolic_shape("b")[0]
    spec = jax.ShapeDtypeStruct((batch, *detector.image_size, 3), jnp.uint8)
    # In a folder of the system's, whose name every library can write to; `path` has any name.
    with tempfile.TemporaryDirectory() as folder:
        made = pathlib.Path(folder) / "export"
        if kind == "stablehlo":
            _stablehlo(compute, spec, made)
        elif kind == "savedmodel":
            _savedmodel(compute_map, spec, pixels, made)
        else:
            _onnx(compute, spec, made)
        checked = _compare(kind, made, compute, images, batch_size or min(16, len(images)))
        place.put(made, path, kind, _about(detector, batch_size))
    return checked


def prepare(kind: str, path: str | os.PathLike) -> pathlib.Path:
    """Refuses, before anything is computed, what could not be written in the end.

    Returns:
      `path`, absolute.

    Raises:
      UserError: something else lies at `path`, it is among a run's checkpoints or cannot be
        written to, or a package is missing.
    """
    path = place.resolve(path)
    check_outside(path, "--output")
    place.check(path, kind)
    with place.staged(path):
        pass
    needed = {"savedmodel": ["tensorflow"], "onnx": ["jax2onnx", "onnxruntime"]}.get(kind, [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format={kind} needs {' and '.join(missing)}: run pip install -e '.[export]' in the "
            "folder of the source tree"
        )
    return path


def _about(detector: Detector, batch_size: int) -> dict[str, Any]:
    """What the user of an export has to know: plain JSON types."""
    provenance = results.provenance()
    height, width = detector.image_size
    return {
        "category": detector.config.category,
        "input": {"name": "image", "type": "uint8", "channels": "RGB",
                  "shape": [batch_size or "any", height, width, 3]},
        "thresholds": detector.thresholds,
        "git": provenance["git"],
        "versions": provenance["versions"],
    }  # fmt: skip


def _stablehlo(compute: Callable, spec: jax.ShapeDtypeStruct, path: pathlib.Path) -> None:
    exported = jax.export.export(jax.jit(compute), platforms=("cpu", "cuda", "tpu"))(spec)
    path.write_bytes(exported.serialize())


def _savedmodel(compute_map: Callable, spec, pixels: int, path: pathlib.Path) -> None:
    import tensorflow as tf
    from jaxlib.mlir.dialects import stablehlo
    from tensorflow.compiler.tf2xla.python import xla

    exported = jax.export.export(jax.jit(compute_map), platforms=("cpu", "cuda"))(spec)
    # jax2tf would write the current StableHLO, which TensorFlow cannot read yet.
    age = getattr(stablehlo.StablehloCompatibilityRequirement, _TENSORFLOW_AGE)
    version = stablehlo.get_version_from_compatibility_requirement(age)
    program = stablehlo.serialize_portable_artifact_str(exported.mlir_module(), version)
    height, width = spec.shape[1:3]
    count = spec.shape[0] if isinstance(spec.shape[0], int) else None
    top = evaluate.score_count(pixels, height, width)
    signature = [tf.TensorSpec([count, height, width, 3], tf.uint8, name="image")]

    class Module(tf.Module):
        @tf.function(input_signature=signature, autograph=False)
        def __call__(self, image):
            (maps,) = xla.call_module(
                [image],
                version=exported.calling_convention_version,
                module=program,
                Sout=[tf.TensorShape([count, height, width])],
                Tout=[tf.float32],
                platforms=["CPU", "CUDA"],
            )
            # In TensorFlow's ops: its XLA knows no top k of a batch of any size.
            best = tf.math.top_k(tf.reshape(maps, [-1, height * width]), top).values
            return {"map": maps, "score": tf.reduce_mean(best, axis=1)}

    module = Module()
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.__call__})


def _onnx(compute: Callable, spec: jax.ShapeDtypeStruct, path: pathlib.Path) -> None:
    import jax2onnx
    import onnx

    logging.getLogger("onnx_ir.serde").addFilter(_is_news)
    model = jax2onnx.to_onnx(
        compute, [spec], model_name="prn", input_names=["image"], output_names=["map", "score"]
    )
    onnx.save(model, str(path))


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a warning says anything: one for each of 220 values without a type does not."""
    return "Skipping serialization" not in str(record.msg)


def _compare(kind: str, path: pathlib.Path, compute, images: np.ndarray, size: int) -> Checked:
    import time

    with tempfile.TemporaryDirectory() as folder:
        given, found = pathlib.Path(folder) / "images.npy", pathlib.Path(folder) / "found.npz"
        np.save(given, images)
        code = _RUNNERS[kind] + _RUN
        # Away from the source tree, so that it cannot import this package by chance.
        result = subprocess.run(
            [sys.executable, "-c", code, str(path.resolve()), str(given), str(found), str(size)],
            cwd=folder,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the {kind} export does not run in its own runtime: {last}")
        with np.load(found) as stored:
            maps, scores, seconds = stored["map"], stored["score"], float(stored["seconds"])
    step = jax.jit(compute)

    def once():
        parts = [step(images[i : i + size]) for i in range(0, len(images), size)]
        return [np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(2)]

    expected = once()
    began = time.perf_counter()
    once()
    own = time.perf_counter() - began
    differences = [
        float(np.abs(a - b).max()) if a.shape == b.shape else np.inf
        for a, b in zip((maps, scores), expected)
    ]
    if not max(differences) <= TOLERANCE:
        raise UserError(
            f"the {kind} export differs from the checkpoint by {max(differences):.2g}, more than "
            f"{TOLERANCE:g}: nothing was written"
        )
    count = len(images)
    return Checked(count, *differences, count / seconds, count / own)
