"""Networks in every runtime, measured in one go: speed, memory, size on disk."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Measured:
    """One network in one runtime.

    Attributes:
      network: its number among those given.
      runtime: a key of `RUNTIMES`.
      batch: images at a time.
      images_per_s: of each round.
      memory_mb: the most that its process had in any round.
      disk_mb: of the export.
    """

    network: int
    runtime: str
    batch: int
    images_per_s: list[float]
    memory_mb: float
    disk_mb: float

    @property
    def median(self) -> float:
        """Images per second."""
        return statistics.median(self.images_per_s)


@dataclasses.dataclass(frozen=True)
class _Export:
    network: int
    runtime: str
    path: pathlib.Path
    files: list[bytes]

    def run(self, batch: int) -> check.Results:
        kind = RUNTIMES[self.runtime][0]
        return check.run(kind, FORMATS[kind], self.path, self.files, batch)

    @property
    def disk_mb(self) -> float:
        parts = [self.path, *self.path.rglob("*")]
        return sum(x.stat().st_size for x in parts if x.is_file()) / 1e6


def measure(
    networks: Sequence[tuple[Detector, np.ndarray]],
    batch_sizes: Sequence[int],
    rounds: int = 3,
    count: int = 64,
) -> Iterator[Measured]:
    """Measures all networks in all runtimes in turn, each in its own process, round by round.

    Args:
      networks: from `prn_jax.load`, each with images, uint8 [n, h, w, 3], which calibrate the 8-bit
        runtimes and are computed.
      batch_sizes: images at a time.
      rounds: how often; what else the machine does meanwhile meets all alike.
      count: images per round, at least; the first batch of each does not count.

    Yields:
      By batch size, and in it by network and runtime.

    Raises:
      UserError: a package is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        exports = []
        for number, (detector, pixels) in enumerate(networks):
            files = [images.encode_png(pixels[i % len(pixels)]) for i in range(count)]
            for name, (kind, int8) in RUNTIMES.items():
                path = prepare(kind, pathlib.Path(folder) / str(len(exports)), int8)
                options = {"calibration": pixels} if int8 else {}
                options["unfused"] = FORMATS[kind].UNFUSED
                made = graph.make(detector, {}, **options)
                FORMATS[kind].write(made, path)
                exports.append(_Export(number, name, path, files))
        for batch in batch_sizes:
            found = [[] for _ in exports]
            for _ in range(rounds):
                for export, results in zip(exports, found):
                    results.append(export.run(batch))
            for export, results in zip(exports, found):
                speeds = [x.images_per_s for x in results]
                memory = max(x.memory_mb for x in results)
                yield Measured(
                    export.network, export.runtime, batch, speeds, memory, export.disk_mb
                )
