"""Masks: read from files of any kind, and resized without losing what is small."""

import functools
import pathlib

import numpy as np
from absl import logging
from scipy import ndimage, sparse

from prn_jax import images
from prn_jax.errors import UserError, shown

_SHARES = (0.5, 0.4, 0.3, 0.2, 0.1)  # of a pixel's area, see `resize_mask`
_NEIGHBOURS = np.ones((3, 3))
_NOISE = 16  # level up to which a JPEG's black may come out, beside what is marked


def _has_lower_areas(levels: np.ndarray, half: int) -> bool:
    """Whether a mask with levels from `half` on has areas of one lower level that is not 0."""
    lower = (levels > 0) & (levels < half)
    if levels.max(initial=0) < half or lower.sum() <= 0.05 * (levels > 0).sum():
        return False
    flat = ndimage.minimum_filter(levels, 3) == ndimage.maximum_filter(levels, 3)
    return bool((lower & flat).any())  # a smooth edge has none


def read_mask_file(path: pathlib.Path) -> np.ndarray:
    """Reads a mask file.

    A pixel counts as defective where its brightest channel reaches half of the full range. Files
    that nowhere get so bright (values 0 and 1, or class numbers) count wherever they are not 0,
    but for the traces that JPEG leaves around what is marked. Transparent pixels are not marked.

    Returns:
      uint8 `[h, w]` in {0, 255}.

    Raises:
      UserError: as `images.read_picture`, or there are several images in the file.
    """
    picture = images.read_picture(path, erase=True)
    if picture.pages > 1:
        raise UserError(
            f"{shown(path)} holds {picture.pages} images: join the mask's into one, and save that"
        )
    levels = picture.levels
    if levels.ndim == 3:
        levels = levels.max(axis=-1)
    if path.suffix.lower() in (".jpg", ".jpeg") and levels.max(initial=0) > _NOISE:
        levels = np.where(levels > _NOISE, levels, 0)
    half = 128 if levels.dtype == np.uint8 else 32768
    if _has_lower_areas(levels, half):
        logging.log_first_n(
            logging.WARNING,
            "%s: areas of levels below half are not marked, only those above, as of each such mask "
            "(said once): give one level to all defects", 1, shown(path),
        )  # fmt: skip
    marked = levels >= half if levels.max(initial=0) >= half else levels > 0
    return np.where(marked, 255, 0).astype(np.uint8)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Brings a mask to the network's size.

    Marked is where more than half of a pixel's area is. A region (8-connected) that this would
    erase or break is marked where more than 0.4 of the area is, or 0.3, 0.2, 0.1: the first share
    that keeps it in one piece. docs/datasets.md has what this does to real masks.

    Args:
      mask: `[h, w]`, anything but 0 is marked.
      size: (height, width) in pixels.

    Returns:
      uint8 `[height, width]` in {0, 1}.
    """
    mask = mask != 0
    if mask.shape == tuple(size) or not mask.any():
        return mask.astype(np.uint8) if mask.any() else np.zeros(size, np.uint8)
    rows, columns = (_cover(n, m) for n, m in zip(mask.shape, size))
    small = _shares(mask, rows, columns) > _SHARES[0]
    regions, _ = ndimage.label(mask, _NEIGHBOURS)
    for number, box in enumerate(ndimage.find_objects(regions), start=1):
        here = tuple(
            slice(x.start * m // n, -(-x.stop * m // n)) for x, n, m in zip(box, mask.shape, size)
        )
        share = _shares(regions[box] == number, rows[here[0], box[0]], columns[here[1], box[1]])
        whole = (x for x in _SHARES if ndimage.label(share > x, _NEIGHBOURS)[1] == 1)
        small[here] |= share > next(whole, _SHARES[-1])
    return small.astype(np.uint8)


def _shares(mask: np.ndarray, rows: sparse.csr_array, columns: sparse.csr_array) -> np.ndarray:
    """The share of each pixel's area that is marked, float32; covers: see `_cover`."""
    return (columns @ (rows @ mask.astype(np.float32)).T).T


@functools.lru_cache(maxsize=64)
def _cover(source: int, target: int) -> sparse.csr_array:
    """How much of each of `target` pixels in a row each of `source` pixels covers."""
    edges = np.linspace(0, source, target + 1)
    spans = [(y, x) for y in range(target) for x in range(int(edges[y]), -int(-edges[y + 1] // 1))]
    y, x = np.array(spans).T
    covered = np.minimum(edges[y + 1], x + 1) - np.maximum(edges[y], x)
    values = (covered * target / source).astype(np.float32)
    return sparse.csr_array((values, (y, x)), shape=(target, source))
