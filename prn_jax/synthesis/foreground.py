"""Where the product is: anomalies belong on it, not beside it.

The normal images themselves tell. On pictures of an object the corners show the background: what
differs from them in colour is the product. On a texture the corners look like everything else, and
the whole image is foreground. Where the background has a structure of its own (holes and strips of
a circuit board), what differs from the corners crosses the border in many places. Then an aligned
product is what occurs nowhere along the border of any image, if the images agree on it; else the
whole image is foreground too. PRN's first author uses a saliency network for this; the estimate
here needs none, and no threshold per category.
"""

import hashlib
import io
import zipfile

import numpy as np
from absl import logging
from etils import epath
from scipy import ndimage, spatial

from prn_jax import disk
from prn_jax.errors import UserError

# Fractions of the image's side, and of its pixels.
_CORNER = 0.06
_SMOOTHING = 0.01
_GROWTH = 0.015
# An object leaves the corners free and fills a fair part of the rest.
_MOST_IN_CORNERS = 0.1
_LEAST, _MOST = 0.04, 0.97
# A product leaves the picture in few places; a background with a structure does in many.
_MOST_CROSSINGS = 4
# Least share of the distances' variance that the two classes explain (one Gaussian: 0.64).
_SEPARATION = 0.7
# What the frame shows, and how it is compared: its width and the scales as fractions of the side,
# how many images judge and how many of their pixels are known.
_FRAME, _SCALES = 0.08, (0.008, 0.03)
_JUDGES, _KNOWN = 32, 2000
# Least intersection over union of each image's product with the common one, and the most of the
# common one in the frame.
_AGREEMENT, _MOST_IN_FRAME = 0.5, 0.02
# Raise it when the estimate changes: what was cached is then made anew.
_VERSION = 4


def cached_foreground(images: np.ndarray, folder: epath.PathLike) -> tuple[np.ndarray, bool]:
    """The estimate of these very images, read from `folder` if it was made before.

    Args:
      images: uint8 [n, h, w, 3].
      folder: where `foreground_<h>x<w>.npz` lies or is written; if it cannot be written, the next
        run estimates again.

    Returns:
      As `estimate_foreground`.
    """
    height, width = images.shape[1:3]
    path = epath.Path(folder) / f"foreground_{height}x{width}.npz"
    digest = hashlib.sha256(f"{_VERSION} {images.shape}".encode())
    digest.update(np.ascontiguousarray(images))
    try:
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            if str(stored["digest"]) == digest.hexdigest():
                masks = np.unpackbits(stored["packed"], axis=-1, count=width)
                return masks, bool(stored["is_object"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # there is none yet, or a damaged one
    masks, is_object = estimate_foreground(images)
    packed, content = np.packbits(masks, axis=-1), io.BytesIO()
    np.savez_compressed(content, packed=packed, is_object=is_object, digest=digest.hexdigest())
    try:
        disk.write_file(path, content.getvalue())
    except UserError as error:
        logging.warning("the foreground is not cached: %s", error)
    return masks, is_object


def estimate_foreground(images: np.ndarray) -> tuple[np.ndarray, bool]:
    """Estimates the foreground of all normal images of a category.

    Args:
      images: uint8 [n, h, w, 3].

    Returns:
      The foreground, uint8 [n, h, w] in {0, 1}, and whether the category is an object; on a
      texture, and where the estimate is not trustworthy, all is foreground.
    """
    step = max(1, min(images.shape[1:3]) // 128)
    small = images[:, ::step, ::step]
    distance = np.empty(small.shape[:3], np.float32)
    for i, image in enumerate(small):
        distance[i] = _distance_from_corners(image)
    threshold, separation = _otsu(distance)
    products = distance > threshold
    del distance
    corner = _corners(products.shape[1:])
    in_corners, coverage = products[:, corner].mean(), products.mean()
    stands_out = (
        separation >= _SEPARATION and in_corners <= _MOST_IN_CORNERS and _LEAST <= coverage <= _MOST
    )
    if not stands_out or np.median([_crossings(x) for x in products]) > _MOST_CROSSINGS:
        products = _unlike_frame(small)
    if products is None:
        return np.ones(images.shape[:3], np.uint8), bool(stands_out)
    products = np.stack([_tidy(x) for x in products])
    if (products.mean(axis=(1, 2)) < _LEAST / 2).mean() > 0.05:
        return np.ones(images.shape[:3], np.uint8), False
    foreground = np.empty(images.shape[:3], np.uint8)
    for whole, product in zip(foreground, products):
        large = _enlarge(product, step)
        # An image in which nothing was found is all foreground rather than none.
        whole[:] = large[: images.shape[1], : images.shape[2]] if product.any() else 1
    return foreground, True


def _enlarge(product: np.ndarray, step: int) -> np.ndarray:
    """A mask `step` times as large, without the staircase that its pixels would leave."""
    if step == 1:
        return product
    large = product.repeat(step, axis=0).repeat(step, axis=1)
    return ndimage.gaussian_filter(large.astype(np.float32), step) >= 0.5


def _unlike_frame(images: np.ndarray) -> np.ndarray | None:
    """What occurs nowhere near the edges of any image, bool [n, h, w]; None without agreement.

    For an aligned product on a structured background: each pixel's surroundings, at a fine and a
    coarse scale, are compared with all that the frame shows.
    """
    side, shape = min(images.shape[1:3]), images.shape[1:3]
    frame = np.ones(shape, bool)
    width = max(2, round(_FRAME * side))
    frame[width:-width, width:-width] = False

    def surroundings(image: np.ndarray) -> np.ndarray:
        image = image.astype(np.float32)
        scales = [ndimage.gaussian_filter(image, (s * side, s * side, 0)) for s in _SCALES]
        return np.concatenate(scales, -1)

    chosen = images[:: -(-len(images) // _JUDGES)]
    known = np.concatenate([surroundings(image)[frame] for image in chosen])
    tree = spatial.cKDTree(known[:: -(-len(known) // _KNOWN)])

    def distance(image: np.ndarray) -> np.ndarray:
        return tree.query(surroundings(image).reshape(-1, known.shape[1]))[0].reshape(shape)

    judged = np.stack([distance(image) for image in chosen])
    mean = judged.mean(axis=0)
    threshold, separation = _otsu(mean)
    common, own = mean > threshold, judged > threshold
    agreement = np.mean([(x & common).sum() / max(1, (x | common).sum()) for x in own])
    if (
        separation < _SEPARATION
        or agreement < _AGREEMENT
        or common[frame].mean() > _MOST_IN_FRAME
        or not _LEAST <= common.mean() <= _MOST
    ):
        return None
    return np.stack([(distance(image) > threshold) | common for image in images])


def describe(foreground: np.ndarray, is_object: bool) -> str:
    """What `estimate_foreground` found, for people."""
    if not is_object:
        return "everywhere (a texture: nothing stands out from the corners)"
    if foreground.all():
        return "everywhere (the background has a structure, from which no object stands out)"
    return f"{foreground.mean():.0%} of the image"


def foreground_points(foreground: np.ndarray, count: int = 256) -> np.ndarray:
    """Pixels of each foreground, evenly spread: float32 [n, count, 2] (row, column)."""
    points = []
    for mask in foreground:
        pixels = np.argwhere(mask)
        # Multiples of the golden ratio spread evenly, and do not line up with the columns.
        order = (np.arange(count) * 0.6180339887 % 1.0 * len(pixels)).astype(int)
        points.append(pixels[order])
    return np.asarray(points, np.float32)


def _corners(shape: tuple[int, int]) -> np.ndarray:
    rows, columns = (max(2, round(_CORNER * n)) for n in shape)
    mask = np.zeros(shape, bool)
    for r in (slice(None, rows), slice(-rows, None)):
        for c in (slice(None, columns), slice(-columns, None)):
            mask[r, c] = True
    return mask


def _crossings(mask: np.ndarray) -> int:
    """In how many separate places a mask, bool [h, w], reaches the border of the image."""
    border = np.concatenate([mask[0], mask[1:, -1], mask[-1, -2::-1], mask[-2:0:-1, 0]])
    return int(np.sum(border & ~np.roll(border, 1)))


def _distance_from_corners(image: np.ndarray) -> np.ndarray:
    """Colour distance of each pixel from the corners' median, float32 [h, w]."""
    sigma = _SMOOTHING * min(image.shape[:2])
    smooth = ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0))
    background = np.median(smooth[_corners(image.shape[:2])], axis=0)
    return np.sqrt(np.square(smooth - background).sum(-1))


def _otsu(values: np.ndarray) -> tuple[float, float]:
    """Otsu's threshold, and the share of the variance that its two classes explain."""
    counts, edges = np.histogram(values, 256)
    middles = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts) / counts.sum()
    partial = np.cumsum(counts * middles) / counts.sum()
    mean = partial[-1]
    variance = (counts * np.square(middles - mean)).sum() / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.square(mean * weight - partial) / (weight * (1 - weight))
    best = int(np.nanargmax(np.where(np.isfinite(between), between, -1.0)))
    return float(edges[best + 1]), float(between[best] / max(variance, 1e-9))


def _tidy(mask: np.ndarray) -> np.ndarray:
    """Fills holes, drops specks, and grows by about a hundredth, so that edges are inside."""
    mask = ndimage.binary_opening(ndimage.binary_fill_holes(mask))
    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    kept = sizes >= 0.1 * sizes.max() if count else np.zeros_like(sizes, bool)
    grow = max(1, round(_GROWTH * min(mask.shape)))
    return ndimage.binary_dilation(kept[labels] & mask, iterations=grow)
