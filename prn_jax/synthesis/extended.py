"""Extended anomalies: regions of the seen defects, moved to other places of normal images.

The paper enlarges the few seen anomalies by placing their anomalous regions on normal images after
random spatial transformations. Each connected region of a seen mask is one piece; it is turned,
scaled, flipped, recoloured and laid on the foreground.
"""

import math

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict
from scipy import ndimage

from prn_jax.synthesis import augment
from prn_jax.synthesis.augment import Draws
from prn_jax.synthesis.simulated import blend


class Extend:
    """Makes extended anomalies out of seen ones.

    Args:
      images: seen anomalous images, uint8 [n, h, w, 3].
      masks: uint8 [n, h, w] in {0, 1}.
      config: `config.synthesis`.
    """

    def __init__(self, images: np.ndarray, masks: np.ndarray, config: ConfigDict):
        self._config = config
        numbers, regions, centres = cut_regions(masks, config.min_region)
        self._images = tf.constant(images)
        self._numbers = tf.constant(numbers, tf.int32)
        self._regions = tf.constant(regions)
        self._centres = tf.constant(centres, tf.float32)

    @property
    def count(self) -> int:
        """Pieces to choose from."""
        return int(self._numbers.shape[0])

    def __call__(
        self, image: tf.Tensor, foreground: tf.Tensor, points: tf.Tensor, draws: Draws
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One attempt.

        Args:
          image: a normal image, uint8 [h, w, 3].
          foreground: where the product is, bool [h, w].
          points: some pixels of the foreground, float32 [m, 2] (row, column).
          draws: random numbers.

        Returns:
          The image with anomalies, uint8 [h, w, 3], and where they may show, bool [h, w].
        """
        pastes = 1 + draws.integer(self._config.max_pastes)
        mask = tf.zeros_like(foreground)
        for number in range(self._config.max_pastes):
            own = Draws(draws.seed(number), 16)
            image, mask = tf.cond(
                number < pastes,
                lambda i=image, m=mask, o=own: self._paste(i, m, foreground, points, o),
                lambda i=image, m=mask: (i, m),
            )
        return image, mask

    def _paste(self, image, mask, foreground, points, draws):
        config = self._config
        piece = draws.integer(self.count)
        source = tf.gather(self._images, self._numbers[piece])
        region = tf.gather(self._regions, piece)[..., None] * 255
        point = tf.gather(points, draws.integer(tf.shape(points)[0]))
        spatial = draws.chance(config.extended_spatial)
        angle = tf.where(spatial, draws.uniform(0.0, 2.0 * math.pi), 0.0)
        scale = tf.where(spatial, draws.uniform(*config.extended_scale), 1.0)
        flip = tf.where(spatial & draws.chance(0.5), -1.0, 1.0)
        moved = augment.warp(
            tf.concat([source, region], -1), angle, scale, self._centres[piece], point, flip
        )
        content, weight = moved[..., :3], tf.cast(moved[..., 3], tf.float32) / 255.0
        jitter = draws.chance(config.extended_colour)
        gain, offset = draws.uniform(0.8, 1.2), draws.uniform(-30.0, 30.0)
        content = tf.cond(
            jitter, lambda: augment.brightness(content, gain, offset), lambda: content
        )
        hue, saturation = draws.uniform(0.45, 0.55), draws.uniform()
        content = tf.cond(
            jitter, lambda: augment.hue_saturation(content, hue, saturation), lambda: content
        )
        low, high = config.extended_opacity
        opacity = tf.where(draws.chance(config.extended_opaque), 1.0, draws.uniform(low, high))
        weight = weight * tf.cast(foreground, tf.float32)
        return blend(image, content, weight, opacity), mask | (weight >= 0.5)


def cut_regions(masks: np.ndarray, min_pixels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The connected (8-connected) regions of masks.

    A mask whose regions are all smaller than `min_pixels` counts as one region.

    Args:
      masks: uint8 [n, h, w] in {0, 1}.
      min_pixels: smaller regions are left out.

    Returns:
      Which image each region is of [r], the regions uint8 [r, h, w] in {0, 1}, and the middles of
      their bounding boxes, float (row, column) [r, 2].
    """
    numbers, regions, centres = [], [], []
    for number, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        kept = [i for i in range(1, count + 1) if sizes[i] >= min_pixels]
        found = [labels == i for i in kept] or [mask > 0]
        for region in found:
            if region.any():
                rows, columns = np.nonzero(region)
                numbers.append(number)
                regions.append(region.astype(np.uint8))
                centres.append([(rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2])
    shape = (0, *masks.shape[1:])
    return (
        np.array(numbers, int),
        np.array(regions, np.uint8).reshape(-1, *shape[1:]),
        (np.array(centres, float).reshape(-1, 2)),
    )
