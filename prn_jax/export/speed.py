"""Images per second of one network in every runtime, measured in one go."""

import pathlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from prn_jax import images
from prn_jax.export import FORMATS, check, graph, prepare
from prn_jax.predict import Detector

# Name -> format, and whether its convolutions have 8 bits.
RUNTIMES = {
    "XLA (StableHLO)": ("stablehlo", False),
    "TensorFlow (SavedModel)": ("savedmodel", False),
    "onnxruntime": ("onnx", False),
    "OpenVINO": ("openvino", False),
    "onnxruntime, int8": ("onnx", True),
}


def measure(
    detector: Detector,
    calibration: np.ndarray,
    batch_sizes: Sequence[int],
    rounds: int = 3,
    count: int = 64,
) -> Iterator[tuple[str, int, float, float, float]]:
    """Measures all runtimes in turn, each in a process of its own, round by round.

    Args:
      detector: from `prn_jax.load`.
      calibration: uint8 [n, h, w, 3], for the 8-bit ones, and to be computed.
      batch_sizes: images at a time.
      rounds: how often; what else the machine does meanwhile meets all runtimes alike.
      count: images per round, at least; the first batch of each does not count.

    Yields:
      Name, batch size, and the median, least and greatest images per second.

    Raises:
      UserError: a package is missing.
    """
    files = [images.encode_png(calibration[i % len(calibration)]) for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for i, (name, (kind, int8)) in enumerate(RUNTIMES.items()):
            paths[name] = prepare(kind, pathlib.Path(folder) / str(i), int8)
            made = graph.make(detector, {}, calibration=calibration if int8 else None)
            FORMATS[kind].write(made, paths[name])
        for batch in batch_sizes:
            found = {name: [] for name in RUNTIMES}
            for _ in range(rounds):
                for name, (kind, _) in RUNTIMES.items():
                    result = check.run(kind, FORMATS[kind], paths[name], files, batch)
                    found[name].append(result.images_per_s)
            for name, speeds in found.items():
                yield name, batch, statistics.median(speeds), min(speeds), max(speeds)
