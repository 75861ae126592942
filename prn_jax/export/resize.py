"""The resize that training uses, `images.resize`, as part of an exported graph.

Pillow's bilinear resize works in whole numbers: along the width, then the height, each pixel of
the result is a weighted sum of levels, the weights in units of 2^-22, rounded to a level. Here each
weight is split into two parts of 11 bits, so that all factors and sums of the matrix products are
exact in float32 (the factors even in TF32 and float16): every runtime gives Pillow's levels to the
bit.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from prn_jax.errors import UserError

_BITS = 22  # of Pillow's weights
_HALF = 2 ** (_BITS // 2)
_EXACT = 2**24  # whole numbers up to here are exact in float32
# Pixels of the result that share a matrix: each needs a narrow window of the image alone, and a
# dense matrix would be zeros for the most part.
_BLOCK = 32


def resize(image: UInt8[Array, "b h w 3"], size: tuple[int, int]) -> UInt8[Array, "b h2 w2 3"]:
    """Brings images to `size`, (height, width), in a graph; equals `images.resize` to the bit."""
    if image.shape[1:3] == tuple(size):
        return image
    x = _resize_last(jnp.transpose(image, (0, 3, 1, 2)), size[1])
    x = jnp.swapaxes(_resize_last(jnp.swapaxes(x, 2, 3), size[0]), 2, 3)
    return jnp.transpose(x, (0, 2, 3, 1)).astype(jnp.uint8)


def check(given: tuple[int, int], size: tuple[int, int]) -> None:
    """Refuses sizes whose sums would not be exact.

    Args:
      given: (height, width) of the camera's images.
      size: of the network's.

    Raises:
      UserError: the image is some fifty times larger than the network's, or empty.
    """
    for source, target in zip(given, size):
        if source < 1:
            raise UserError(f"input_size={given[0]},{given[1]}: give two numbers above 0")
        _, low = _split(weights(source, target))
        if 255 * np.abs(low).sum(axis=1).max() >= _EXACT:
            raise UserError(
                f"input_size={given[0]},{given[1]}: too large for a network of {size[0]}x{size[1]} "
                "pixels; train at a larger image_size, or reduce the images before"
            )


def weights(source: int, target: int) -> np.ndarray:
    """Pillow's weights along one axis, in units of 2^-22: int64 [target, source].

    A triangle around each pixel's centre, as wide as two pixels of the coarser side, cut off at the
    border and normalised (`precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's Resample.c).
    """
    scale = source / target
    support = max(scale, 1.0)
    found = np.zeros((target, source), np.int64)
    for i in range(target):
        centre = (i + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), source)
        distance = np.abs((np.arange(first, last) - centre + 0.5) * (1.0 / support))
        triangle = np.maximum(1.0 - distance, 0.0)
        total = 0.0
        for value in triangle:  # one after another, as Pillow sums them
            total += value
        found[i, first:last] = (triangle / total * 2**_BITS + 0.5).astype(np.int64)
    return found


def _split(whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low parts: `whole = high * 2^11 + low`, at most 2^11 and 2^10 in size."""
    high = (whole + _HALF // 2) // _HALF
    return high, whole - high * _HALF


def _resize_last(x: Float[Array, "b c h w"], target: int) -> Float[Array, "b c h w2"]:
    """One pass, along the last axis: levels in, levels out."""
    source = x.shape[-1]
    if source == target:
        return x
    whole = weights(source, target)
    parts = []
    for start in range(0, target, _BLOCK):
        rows = whole[start : start + _BLOCK]
        used = np.flatnonzero(rows.any(axis=0))
        window = slice(int(used[0]), int(used[-1]) + 1)
        matrix = np.concatenate(_split(rows[:, window])).T.astype(np.float32)
        sums = jnp.matmul(
            x[..., window].astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST
        )
        high, low = sums[..., : len(rows)], sums[..., len(rows) :]
        # floor((high * 2^11 + low) / 2^22 + 1/2), without a number that float32 would round.
        parts.append(jnp.floor((high + jnp.floor(low / _HALF)) / _HALF + 0.5))
    return jnp.concatenate(parts, axis=-1)
