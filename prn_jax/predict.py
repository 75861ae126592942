"""A trained network, as a product uses it: images of any size in, maps and scores out.

Nothing here imports TensorFlow.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging as python_logging
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from prn_jax import deep, evaluate
from prn_jax import mesh as meshes
from prn_jax.checkpoints import Checkpoints, folder_of
from prn_jax.checkpoints import digest as digest_of
from prn_jax.errors import UserError, shown
from prn_jax.identity import Identity
from prn_jax.images import known_white, read_array, resize, to_uint8, upright
from prn_jax.models.prn import PRN, create_model
from prn_jax.tiles import Tiling

_BAND = 2048  # rows of a map that are resized at a time
# One image: a path, an image of Pillow's, or an array of levels [h, w, 3], [h, w, 1] or [h, w].
ImageLike = str | os.PathLike | Image.Image | np.ndarray


class Inspection(NamedTuple):
    """All that is known of one image, or of several.

    Attributes:
      map: in [0, 1] at the image's own size, float32 [h, w]; of several a list of them, or
        [n, h, w] if the images were one array.
      score: in [0, 1], float32; of several [n].
      distance: of the whole image from normal ones, float32; of several [n]. About 1 for an image
        as those that were trained on; from `thresholds["distance"]` on it is not of the product, or
        the light has changed, and the map and the score mean nothing.
    """

    map: np.ndarray | list[np.ndarray]
    score: np.ndarray | np.float32
    distance: np.ndarray | np.float32


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
    """A trained network with its thresholds; made by `load`.

    Attributes:
      model: the network.
      variables: its collections, on the devices of `mesh`.
      config: what it was trained with.
      step: of the checkpoint.
      thresholds: see `thresholds.choose`; None if the training did not come to its evaluation.
      mesh: devices.
      white_level: the grey level that is white in images of more than 8 bits; 0: not known, each
        image's is guessed.
      digest: tells this training, and this step of it, from others.
      identity: what it is made of.
      folder: of its checkpoints.
    """

    model: PRN = dataclasses.field(repr=False)
    variables: Any = dataclasses.field(repr=False)
    config: ConfigDict = dataclasses.field(repr=False)
    step: int
    thresholds: dict[str, Any] | None = dataclasses.field(repr=False)
    mesh: Mesh
    white_level: int = 0
    digest: str = ""
    identity: Identity | None = dataclasses.field(default=None, repr=False)
    folder: epath.Path | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels at which an image is looked at, in tiles or as a whole."""
        return Tiling.of(self.config).size

    @property
    def roi(self) -> np.ndarray | None:
        """The region of interest at the size that images are looked at, uint8 [h, w]; None: all."""
        stored = self.variables["prototypes"].get("interest")
        mask = None if stored is None else np.asarray(jax.device_get(stored["mask"]))
        return None if mask is None or mask.all() else mask

    def __call__(
        self,
        images: ImageLike | Iterable[ImageLike],
        batch_size: int | None = None,
        fill: bool = False,
    ) -> tuple[np.ndarray | list[np.ndarray], np.ndarray | np.float32]:
        """Anomaly maps and scores: the first two of what `inspect` returns."""
        return self.inspect(images, batch_size, fill)[:2]

    def inspect(
        self,
        images: ImageLike | Iterable[ImageLike],
        batch_size: int | None = None,
        fill: bool = False,
    ) -> Inspection:
        """Anomaly maps, scores, and distances of the whole images.

        Args:
          images: one image or several, of any sizes: arrays uint8 or uint16 [h, w, 3] or grey
            [h, w], images of Pillow's, paths; several also as one array [n, h, w, 3] or
            [n, h, w, 1].
          batch_size: images at a time over all devices; default: the configuration's.
          fill: see `evaluate.predict`.

        Returns:
          See `Inspection`.

        Raises:
          UserError: an image has another shape or type, or its file cannot be read.
        """
        single = _is_one(images)
        small, sizes = self._fit([images] if single else _several(images), single)
        maps, scores, distances = evaluate.predict(
            self.model,
            self.variables,
            small,
            self.mesh,
            batch_size=batch_size or self.config.eval_batch_size,
            score_pixels=self.config.score_pixels,
            fill=fill,
        )
        sized = [resize_map(m, size) for m, size in zip(maps, sizes)]
        if single:
            return Inspection(sized[0], scores[0], distances[0])
        if getattr(images, "ndim", 0) == 4:
            sized = np.array(sized, np.float32).reshape(images.shape[:3])
        return Inspection(sized, scores, distances)

    def describe(self, images: Iterable[ImageLike], batch_size: int | None = None) -> np.ndarray:
        """What distances of whole images are between, of several: see `evaluate.describe`."""
        small, _ = self._fit([images] if _is_one(images) else _several(images))
        size = batch_size or self.config.eval_batch_size
        return evaluate.describe(self.model, self.variables, small, self.mesh, size)

    def _fit(
        self, images: Iterable[ImageLike], single: bool = False
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Images at the network's size, uint8 [n, h, w, 3], and their own sizes."""
        small, sizes = [], []
        for number, image in enumerate(images):
            try:
                pixels = _pixels(image, self.white_level)
            except UserError as error:
                raise error if single else UserError(f"image {number}: {error}") from None
            sizes.append(pixels.shape[:2])
            small.append(resize(pixels, self.image_size))
        return np.array(small, np.uint8).reshape(-1, *self.image_size, 3), sizes


def load(
    checkpoint: str | os.PathLike, step: int | None = None, white_level: int | None = None
) -> Detector:
    """Loads a trained network for prediction.

    Args:
      checkpoint: `<workdir>/<category>`, or the folder `checkpoints` in it; local or `gs://`.
      step: which one; the newest by default.
      white_level: the grey level that is white in images of more than 8 bits; as in training by
        default.

    Raises:
      UserError: there is no such checkpoint.
    """
    folder = epath.Path(os.path.expanduser(os.fspath(checkpoint)))
    if "://" not in os.fspath(folder):
        folder = folder.resolve()
    folder = folder_of(folder)
    if not folder.is_dir():
        raise UserError(
            f"no checkpoint at {shown(checkpoint)}: give <workdir>/<category> of a training"
        )
    if "://" not in os.fspath(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{shown(folder)} may not be read: Permission denied")
    with _without_orbax_warnings():
        checkpoints = Checkpoints(folder, read_only=True)
        try:
            steps = checkpoints.steps()
            if not steps:
                raise UserError(
                    f"no checkpoint in {shown(folder)}: give <workdir>/<category> of a training"
                )
            step = steps[-1] if step is None else step
            if step not in steps:
                raise UserError(
                    f"no checkpoint of step {step} in {shown(folder)}: there are {steps}"
                )
            identity = checkpoints.identity(step)
            network = checkpoints.restore_model(step)
        finally:
            checkpoints.close()
    config, network_digest = ConfigDict(identity.config), digest_of(network)
    thresholds = _thresholds(folder, step, network_digest)
    if thresholds:  # with what they were chosen for; it may have changed since the checkpoint
        config.score_pixels = thresholds.get("score_pixels", config.score_pixels)
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    variables = meshes.replicate(mesh, jax.device_get(network))
    stored = network["prototypes"]["scale_0"]["maps"].shape[0]
    count = max(1, stored // Tiling.of(config).count)
    model = create_model(config, count, identity.turns)
    say_type(thresholds, model.dtype)
    white = identity.white_level if white_level is None else white_level
    told = [identity.as_json(), step, network_digest, white]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    return Detector(
        model, variables, config, step, thresholds, mesh, white, digest.hexdigest(), identity,
        folder,
    )  # fmt: skip


def say_type(thresholds: dict[str, Any] | None, dtype: np.typing.DTypeLike) -> None:
    """Warns where scores are computed in another type than those that set the thresholds."""
    here = np.dtype(dtype).name
    there = (thresholds or {}).get("dtype", here)
    if here != there:
        logging.warning(
            "scores are computed in %s here, in %s where the thresholds were chosen: they differ "
            "by up to a hundredth, and so may verdicts near a threshold", here, there,
        )  # fmt: skip


def _is_one(images: Any) -> bool:
    if isinstance(images, str | os.PathLike | Image.Image):
        return True
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUS":  # of images, or paths
        return False
    return hasattr(images, "__array__") and images.ndim != 4


def _several(images: Any) -> Iterable[Any]:
    if getattr(images, "ndim", 0) == 4 and images.shape[-1] not in (1, 3):
        hint = "give uint8 [n, h, w, 3]"
        if images.shape[1] in (1, 3):
            hint = "the channels come last: give images.transpose(0, 2, 3, 1)"
        raise UserError(f"images of shape {tuple(images.shape)} and type {images.dtype}: {hint}")
    if not isinstance(images, Iterable):
        raise UserError(f"{type(images).__name__}: give an image, or several in a list")
    return images


def _pixels(image: ImageLike, white: int) -> np.ndarray:
    """One image as uint8 [h, w, 3]."""
    if isinstance(image, str | os.PathLike):
        return read_array(pathlib.Path(os.path.expanduser(image)), white)
    if isinstance(image, Image.Image):
        if deep.is_cut(image):
            raise UserError("Pillow does not keep the levels of more than 8 bits: give its path")
        image = upright(image)
    if not hasattr(image, "__array__"):
        raise UserError(
            f"a {type(image).__name__} is no image: give uint8 [h, w, 3], a path or a PIL image"
        )
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3) or not image.size:
        hint = "give uint8 or uint16 [h, w, 3] or [h, w]"
        if image.ndim == 3 and image.shape[2] == 4:
            hint = "without the fourth channel: give image[..., :3]"
        elif image.ndim == 3 and image.shape[0] in (1, 3):
            hint = "the channels come last: give image.transpose(1, 2, 0)"
        elif image.ndim == 3 and image.size:
            hint += ", several grey images in a list or as [n, h, w, 1]"
    elif image.dtype not in (np.uint8, np.uint16):
        hint = "give uint8 or uint16, 0 being black"
    else:
        white = known_white(image, white, "an image")
        return np.broadcast_to(to_uint8(image, white), (*image.shape[:2], 3))
    raise UserError(f"an image of shape {image.shape} and type {image.dtype}: {hint}")


def resize_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Brings an anomaly map, float32 [h, w], to another (height, width), bilinearly."""
    if values.shape == tuple(size):
        return values
    picture = Image.fromarray(np.ascontiguousarray(values, np.float32))
    resized = np.empty(size, np.float32)
    for top in range(0, size[0], _BAND):  # a large map would be held three times
        rows = resized[top : top + _BAND]
        box = [x * values.shape[0] / size[0] for x in (top, top + len(rows))]
        rows[:] = picture.resize(
            (size[1], len(rows)), Image.Resampling.BILINEAR, (0, box[0], values.shape[1], box[1])
        )
    return resized


@contextlib.contextmanager
def _without_orbax_warnings() -> Iterator[None]:
    """Orbax warns of what it was not asked for; what fails raises."""

    def ours(record: python_logging.LogRecord) -> bool:
        return "/orbax/" not in record.pathname

    logger = logging.get_absl_logger()
    logger.addFilter(ours)
    try:
        yield
    finally:
        logger.removeFilter(ours)


def _thresholds(folder: epath.Path, step: int, network: str) -> dict[str, Any] | None:
    path = folder / "thresholds.json"
    try:
        stored = json.loads(path.read_text())
        stored["image"] + stored["pixel"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown(path)} is damaged: remove it and give --threshold") from error
    if stored["step"] != step:
        logging.warning(
            "%s is of step %d, the checkpoint of step %d: thresholds left out",
            shown(path), stored["step"], step,
        )  # fmt: skip
        return None
    if stored.get("network", network) != network:
        logging.warning(
            "%s is of another network than the checkpoint: thresholds left out; copy the whole "
            "folder once more", shown(path),
        )  # fmt: skip
        return None
    return stored
