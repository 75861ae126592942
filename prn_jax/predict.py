"""A trained network, as a product uses it: images of any size in, maps and scores out.

Nothing here imports TensorFlow.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from prn_jax import evaluate
from prn_jax import mesh as meshes
from prn_jax.checkpoints import Checkpoints
from prn_jax.errors import UserError
from prn_jax.models.prn import PRN, create_model


@dataclasses.dataclass(frozen=True)
class Detector:
    """A trained network with its thresholds; made by `load`.

    Attributes:
      model: the network.
      variables: its collections, on the devices of `mesh`.
      config: what it was trained with.
      thresholds: `image` and `pixel`, from which score and value something is anomalous, and their
        `source`; None if the training did not come to its evaluation.
      mesh: devices.
    """

    model: PRN
    variables: Any
    config: ConfigDict
    thresholds: dict[str, Any] | None
    mesh: Mesh

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels at which the network looks at an image."""
        return tuple(self.config.image_size)

    def __call__(
        self, images: np.ndarray | Sequence[np.ndarray], batch_size: int | None = None
    ) -> tuple[np.ndarray | list[np.ndarray], np.ndarray]:
        """Anomaly maps and scores.

        Args:
          images: uint8 [n, h, w, 3], or a sequence of uint8 [h, w, 3] or [h, w] of any sizes.
          batch_size: images at a time over all devices; default: the configuration's.

        Returns:
          Maps in [0, 1] at each image's own size, float32 [n, h, w] or a list of [h, w], and scores
          in [0, 1], float32 [n].

        Raises:
          UserError: an image is not uint8, or has another shape.
        """
        small = [fit(x, self.image_size) for x in images]
        stacked = np.stack(small) if small else np.zeros((0, *self.image_size, 3), np.uint8)
        maps, scores = evaluate.predict(
            self.model,
            self.variables,
            stacked,
            self.mesh,
            batch_size=batch_size or self.config.eval_batch_size,
            score_pixels=self.config.score_pixels,
        )
        sized = [resize_map(m, x.shape[:2]) for m, x in zip(maps, images)]
        if isinstance(images, np.ndarray):
            return np.array(sized, np.float32).reshape(images.shape[:3]), scores
        return sized, scores


def load(checkpoint: str | os.PathLike, step: int | None = None) -> Detector:
    """Loads a trained network for prediction.

    Args:
      checkpoint: `<workdir>/<category>`, or the folder `checkpoints` in it; local or `gs://`.
      step: which one; the newest by default.

    Raises:
      UserError: there is no such checkpoint.
    """
    folder = epath.Path(os.fspath(checkpoint)).expanduser()
    if "://" not in os.fspath(folder):
        folder = folder.resolve()
    if (folder / "checkpoints").exists():
        folder = folder / "checkpoints"
    if not folder.exists():
        raise UserError(f"no checkpoint at {checkpoint}: give <workdir>/<category> of a training")
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"no checkpoint in {folder}: give <workdir>/<category> of a training")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(f"no checkpoint of step {step} in {folder}: there are {steps}")
        config = ConfigDict(checkpoints.identity(step).config)
        network = checkpoints.restore_model(step)
    finally:
        checkpoints.close()
    scale = network["prototypes"]["scale_0"]["maps"]
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    variables = meshes.replicate(mesh, jax.device_get(network))
    model = create_model(config, scale.shape[0])
    return Detector(model, variables, config, _thresholds(folder, step), mesh)


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Brings an image to the network's size as training does: antialiased, to the nearest level.

    Args:
      image: uint8 [h, w, 3], or grey [h, w].
      size: (height, width) in pixels.

    Returns:
      uint8 [height, width, 3].
    """
    image = np.asarray(image)
    if image.ndim == 2:
        image = np.stack([image] * 3, axis=-1)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(
            f"an image of shape {image.shape} and type {image.dtype}: give uint8 [h, w, 3] or "
            "[h, w]"
        )
    if image.shape[:2] == tuple(size):
        return image
    resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized)


def resize_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Brings an anomaly map, float32 [h, w], to another (height, width), bilinearly."""
    if values.shape == tuple(size):
        return values
    picture = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))


def _thresholds(folder: epath.Path, step: int) -> dict[str, Any] | None:
    path = folder / "thresholds.json"
    try:
        stored = json.loads(path.read_text())
        stored["image"] + stored["pixel"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove it and give --threshold") from error
    if stored["step"] != step:
        logging.warning(
            "%s is of step %d, the checkpoint of step %d: thresholds left out",
            path, stored["step"], step,
        )  # fmt: skip
        return None
    return stored
