"""How content is laid on an image, and whether what was laid on it shows."""

import math

import numpy as np
import tensorflow as tf

# Rec. 601, as for hue and saturation.
_LUMINANCE = (0.299, 0.587, 0.114)


def blend(image: tf.Tensor, content: tf.Tensor, weight: tf.Tensor, opacity: tf.Tensor) -> tf.Tensor:
    """`image + opacity * weight * (content - image)`.

    Args:
      image: uint8 [h, w, 3].
      content: uint8 [h, w, 3].
      weight: bool, or float32 in [0, 1], [h, w].
      opacity: scalar in [0, 1].
    """
    weight = (tf.cast(weight, tf.float32) * opacity)[..., None]
    below = tf.cast(image, tf.float32)
    mixed = below + weight * (tf.cast(content, tf.float32) - below)
    return tf.cast(tf.round(mixed), tf.uint8)


def soften(image: tf.Tensor, made: tf.Tensor, sigma: float) -> tf.Tensor:
    """`image + gaussian(made - image)`: what was pasted, with edges as soft as a lens gives them.

    Args:
      image: uint8 [h, w, 3].
      made: the image with something pasted, uint8 [h, w, 3].
      sigma: pixels; 0 leaves `made`.
    """
    if not sigma:
        return made
    reach = math.ceil(3 * sigma)
    weight = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / sigma))
    kernel = np.tile((weight / weight.sum()).astype(np.float32)[:, None, None, None], (1, 1, 3, 1))
    below = tf.cast(image, tf.float32)
    change = tf.cast(made, tf.float32) - below
    change = tf.pad(change, [[reach, reach], [reach, reach], [0, 0]], "SYMMETRIC")[None]
    for axes in ((0, 1, 2, 3), (1, 0, 2, 3)):
        change = tf.nn.depthwise_conv2d(change, kernel.transpose(axes), [1] * 4, "VALID")
    return tf.saturate_cast(tf.round(below + change[0]), tf.uint8)


def difference(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Largest difference over the channels of uint8 [h, w, 3], int32 [h, w]."""
    return tf.cast(tf.reduce_max(tf.maximum(a, b) - tf.minimum(a, b), axis=-1), tf.int32)


def count(mask: tf.Tensor) -> tf.Tensor:
    """True pixels of a mask, float32."""
    return tf.cast(tf.math.count_nonzero(mask, dtype=tf.int32), tf.float32)


def shown_part(visible: tf.Tensor, region: tf.Tensor, share: float, window: int) -> tf.Tensor:
    """The part of a region around whose pixels at least `share` of the region is visible.

    Single pixels that happen to look as before do not make holes in it, and single ones that show
    do not make an anomaly; where nothing shows over more than a window, nothing is left.

    Args:
      visible: bool [h, w], of known size.
      region: bool [h, w].
      share: in [0, 1].
      window: side of the square around a pixel, odd, pixels.

    Returns:
      bool [h, w].
    """
    surplus = tf.where(region, tf.cast(visible, tf.float32) - share, 0.0)
    rows, columns = (_band(size, window // 2) for size in surplus.shape)
    return region & (rows @ surplus @ columns >= -1e-3)  # a sum of at least 0, but for rounding


def _band(size: int, reach: int) -> tf.Tensor:
    """A matrix that sums over the neighbours up to `reach` away, float32 [size, size]."""
    place = np.arange(size)
    return tf.constant(np.abs(place[:, None] - place) <= reach, tf.float32)


def to_grey(image: tf.Tensor) -> tf.Tensor:
    """The luminance in all three channels, uint8 [..., 3]; grey values stay as they are."""
    flat = tf.reshape(tf.cast(image, tf.float32), [-1, 3])
    luminance = tf.matmul(flat, tf.constant([[weight] * 3 for weight in _LUMINANCE]))
    return tf.reshape(tf.saturate_cast(tf.round(luminance), tf.uint8), tf.shape(image))


def is_grey(images: np.ndarray) -> bool:
    """Whether the channels are equal everywhere, but for rounding: uint8 [n, h, w, 3]."""
    return all(np.ptp(image, axis=-1).max(initial=0) <= 2 for image in images)
