"""Textures, the content of simulated anomalies: DTD, a folder of images, or bundled ones."""

import hashlib
import os
import pathlib
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image
from scipy import ndimage

from prn_jax import images
from prn_jax.errors import UserError, first_line, shown

# scikit-image's photographs that its package contains.
_PHOTOGRAPHS = (
    "brick",
    "grass",
    "gravel",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "moon",
    "page",
    "rocket",
    "retina",
    "immunohistochemistry",
    "hubble_deep_field",
)
_CROPS = 12  # of each photograph
_PROCEDURAL = 60


def load_textures(
    source: str, size: tuple[int, int], limit: int, *, data_dir: str, exclude: str = ""
) -> np.ndarray:
    """Reads textures and brings them to one size.

    Args:
      source: "dtd" (TFDS's data set, prepared under `data_dir`), a folder of images that is
        searched recursively, or "" for scikit-image's photographs and procedural textures.
      size: (height, width), pixels.
      limit: at most so many, evenly spread over what is there.
      data_dir: TFDS's.
      exclude: name of a photograph to leave out (the demo's own).

    Returns:
      uint8 [n, height, width, 3].

    Raises:
      UserError: the folder is missing or has no images, one that is taken from it cannot be read,
        or TFDS cannot prepare DTD.
    """
    if source == "dtd":
        return _from_tfds(size, limit, data_dir)
    if source:
        return _from_folder(pathlib.Path(os.path.expanduser(source)), size, limit)
    photographs = _bundled(size, exclude)
    both = photographs + procedural(size, _PROCEDURAL)
    kept = spread(len(both), limit)
    crops = sum(i < len(photographs) for i in kept)
    logging.info(
        "synthesis.textures is not set: simulated anomalies are made of %d crops of scikit-image's "
        "photographs and %d procedural textures (published results have DTD's)",
        crops,
        len(kept) - crops,
    )
    return np.stack([both[i] for i in kept])


def check(config: ConfigDict) -> None:
    """Looks, before anything is computed, whether there are textures.

    Raises:
      UserError: `synthesis.textures` names no folder, or one without images.
    """
    if config.synthesis.textures not in ("", "dtd") and config.total_steps:
        _find(pathlib.Path(os.path.expanduser(config.synthesis.textures)))


def fingerprint(config: ConfigDict) -> str:
    """Tells the textures that are there from others, by names and sizes.

    "" where none are, for TFDS's DTD, and where nothing is trained.
    """
    source = config.synthesis.textures
    folder = pathlib.Path(os.path.expanduser(source))
    if not config.total_steps or source == "dtd" or not folder.is_dir():
        return ""
    paths = _find(folder)[0] if source else _photographs()
    names = [path.relative_to(folder).as_posix() if source else path.name for path in paths]
    sizes = [path.stat().st_size if path.exists() else 0 for path in paths]
    return hashlib.sha256(repr(list(zip(names, sizes))).encode("utf-8", "replace")).hexdigest()


def _find(folder: pathlib.Path) -> tuple[list[pathlib.Path], str]:
    """The images of a folder, and what was skipped, in words."""
    if not folder.is_dir():
        what = "it is a file; give its folder" if folder.exists() else "no such folder"
        raise UserError(f"synthesis.textures={shown(folder)}: {what}")
    paths, skipped = images.find_images(folder)
    why = f"skipped {images.describe_skipped(skipped)}" if skipped else ""
    if not paths:
        raise UserError(
            f"synthesis.textures={shown(folder)}: there are no images in it{why and '; '}{why}"
        )
    return paths, why


def _from_folder(folder: pathlib.Path, size: tuple[int, int], limit: int) -> np.ndarray:
    paths, why = _find(folder)
    if why:
        logging.warning("synthesis.textures: %s", why)
    chosen = (paths[i] for i in spread(len(paths), limit))
    return np.stack([images.resize(images.read_array(path), size) for path in chosen])


def _from_tfds(size: tuple[int, int], limit: int, data_dir: str) -> np.ndarray:
    builder = prepare_dtd(data_dir)
    split = builder.as_dataset(split="train", shuffle_files=False)
    kept = set(spread(int(builder.info.splits["train"].num_examples), limit))
    return np.stack([
        _fit(Image.fromarray(x["image"].numpy()), size)
        for i, x in enumerate(split) if i in kept
    ])  # fmt: skip


def prepare_dtd(data_dir: str) -> Any:
    """TFDS's builder of DTD, downloaded where it is not there: by one process at a time.

    Raises:
      UserError: it cannot be had.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder("dtd", data_dir=os.path.expanduser(data_dir))  # or gs://
        builder.download_and_prepare()
    except Exception as error:
        raise UserError(
            f"synthesis.textures=dtd cannot be prepared by TFDS under {data_dir} "
            f"({first_line(error)}): give the folder of an unpacked DTD instead"
        ) from error
    return builder


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, evenly spread."""
    return sorted({int(i * count / min(count, limit)) for i in range(min(count, limit))})


def _fit(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR))


def _bundled(size: tuple[int, int], exclude: str) -> list[np.ndarray]:
    """Crops of scikit-image's photographs; none where scikit-image is not installed."""
    rng = np.random.default_rng(0)
    textures = []
    for path in _photographs(exclude):
        with Image.open(path) as image:
            photograph = image.convert("RGB")
        for _ in range(_CROPS):
            side = rng.uniform(0.25, 0.75) * min(photograph.size)
            left, top = (rng.uniform(0, n - side) for n in photograph.size)
            crop = photograph.crop((int(left), int(top), int(left + side), int(top + side)))
            textures.append(_fit(crop, size))
    return textures


def _photographs(exclude: str = "") -> list[pathlib.Path]:
    try:
        import skimage
    except ImportError:
        return []
    # By path: its loader would fetch from the network what the package does not contain.
    folder = pathlib.Path(skimage.__file__).parent / "data"
    found = ([p for p in folder.glob(f"{x}.*") if images.is_image(p)] for x in _PHOTOGRAPHS)
    return [paths[0] for paths in found if paths and paths[0].stem != exclude]


def procedural(size: tuple[int, int], count: int) -> list[np.ndarray]:
    """Stripes, cells and clouds in random colours: uint8 [h, w, 3] each, always the same."""
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
    textures = []
    for number in range(count):
        kind = number % 3
        if kind == 2:
            sigma = float(rng.uniform(1.0, 12.0))
            field = ndimage.gaussian_filter(rng.normal(size=size), sigma, mode="wrap")
            field = field / field.std()
        else:
            angle, period = rng.uniform(0, np.pi), rng.uniform(4, 40)
            along = (np.cos(angle) * columns + np.sin(angle) * rows) * 2 * np.pi / period
            across = (np.cos(angle) * rows - np.sin(angle) * columns) * 2 * np.pi / period
            field = np.sin(along) * (np.sin(across) if kind else 1.0)
            field = field + rng.normal(size=size) * rng.uniform(0.0, 0.3)
        share = np.clip(field * 0.5 + 0.5, 0, 1)[..., None]
        low, high = rng.uniform(0, 255, (2, 3))
        textures.append(np.round(low + share * (high - low)).astype(np.uint8))
    return textures
