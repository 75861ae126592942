"""A region of interest: `roi.png` beside a product's folders `train` and `test`. White counts."""

import base64
import io
import pathlib

import numpy as np
from PIL import Image

from prn_jax import images
from prn_jax.datasets import layout
from prn_jax.errors import UserError, shown
from prn_jax.masks import read_mask_file, resize_mask

NAME = "roi.png"  # or another type of image, however it is written


def _find(folder: pathlib.Path) -> pathlib.Path | None:
    """The file.

    Raises:
      UserError: there are two.
    """
    found = [x for x in layout.out_of_place(folder, ()) if images.is_region(x)]
    if len(found) > 1:
        raise UserError(f"{shown(found[0])} and {found[1].name} are both there: keep one")
    return found[0] if found else None


def content(folder: pathlib.Path) -> bytes:
    """The file's bytes; none where there is no such file."""
    path = _find(folder)
    return path.read_bytes() if path else b""


def read(folder: pathlib.Path) -> np.ndarray | None:
    """The region of a category's folder, uint8 [h, w] in {0, 255}; None where none is drawn.

    Raises:
      UserError: there are two, or it is unreadable, or empty.
    """
    path = _find(folder)
    if path is None:
        return None
    mask = read_mask_file(path)
    if not mask.any():
        raise UserError(f"{shown(path)} is black: paint white what counts, or remove it")
    return mask


def stretched(mask: np.ndarray | None, size: tuple[int, int]) -> bool:
    """Whether an image has other proportions than the region, by more than a hundredth."""
    return mask is not None and abs(size[0] * mask.shape[1] / (size[1] * mask.shape[0]) - 1) > 0.01


def to_text(mask: np.ndarray) -> str:
    """A region as it is kept with the TFRecords."""
    return base64.b64encode(images.encode_png(mask)).decode()


def from_text(text: str, size: tuple[int, int]) -> np.ndarray:
    """What `to_text` made, uint8 of another (height, width), in {0, 1}."""
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    return resize_mask(mask, size)
