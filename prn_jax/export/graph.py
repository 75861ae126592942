"""What is exported: the resize, the network, score and distance, as functions of images."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prn_jax import evaluate
from prn_jax.export import resize
from prn_jax.models.whole import raised
from prn_jax.predict import Detector

Size = tuple[int, int]
OUTPUTS = ("map", "score", "distance")


@dataclasses.dataclass(frozen=True)
class Graph:
    """A trained network for other runtimes; float32 throughout.

    Attributes:
      inspect: uint8 [b, *size, 3] -> maps, float32 [b, *size] in [0, 1], and distances of the whole
        images from normal ones, float32 [b].
      size: (height, width) of the network, or of the whole that its tiles are laid to.
      given: (height, width) of the images that the export takes.
      batch: images that it takes at a time; 0: any number.
      score_pixels: see `evaluate.image_score`.
      exponent: see `models.whole.raised`.
      about: what its user has to know: plain JSON types.
      opset: of ONNX; None: the converter's own.
      calibration: uint8 [n, *size, 3], by which an integer network is made; None: none is.
    """

    inspect: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    size: Size
    given: Size
    batch: int
    score_pixels: int
    exponent: float | None
    about: dict[str, Any]
    opset: int | None = None
    calibration: np.ndarray | None = None

    def compute(self, image: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`OUTPUTS` of images at the network's size."""
        maps, distances = self.inspect(image)
        scores = evaluate.image_score(maps, self.score_pixels)
        return maps, raised(scores, distances, self.exponent), distances

    def resize(self, image: jax.Array) -> jax.Array:
        """Images at the camera's size -> at the network's."""
        return resize.resize(image, self.size)

    def spec(self, size: Size) -> jax.ShapeDtypeStruct:
        """Of a batch of images at a size."""
        batch = self.batch or jax.export.symbolic_shape("b")[0]
        return jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8)


def make(
    detector: Detector,
    about: dict[str, Any],
    given: Size | None = None,
    batch: int = 0,
    opset: int | None = None,
    calibration: np.ndarray | None = None,
    unfused: bool = False,
) -> Graph:
    """The graph of a detector; see `Graph`, and `PRN` for the last argument.

    Raises:
      UserError: the camera's images are too large for the network.
    """
    size = detector.image_size
    resize.check(given or size, size)
    model = detector.model.clone(dtype=jnp.float32, unfused=unfused)
    variables = jax.tree.map(jnp.asarray, jax.device_get(detector.variables))

    def inspect(image):
        return evaluate.stitched(model, variables, image)

    exponent = evaluate.exponent_of(model, variables)
    return Graph(
        inspect, size, given or size, batch, detector.config.score_pixels,
        None if exponent is None else float(exponent), about, opset, calibration,
    )  # fmt: skip
