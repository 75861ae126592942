"""Simulated anomalies: Perlin-shaped patches of something else, for anomalies never seen.

Follows DiffusionAD, by PRN's first author: the shape is thresholded Perlin noise, turned, kept on
the foreground; the content is a texture or the image itself cut into a grid and shuffled; it is
blended with a random opacity.
"""

import math

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from prn_jax.synthesis import augment
from prn_jax.synthesis.augment import Draws
from prn_jax.synthesis.blending import blend, count, difference, shown_part, to_grey
from prn_jax.synthesis.perlin import PerlinNoise

# Side of the window in which an anomaly must show, as a share of the image's.
_WINDOW = 1 / 16


class Simulate:
    """Makes simulated anomalies for images of one size.

    Args:
      size: (height, width), pixels.
      textures: uint8 [n, height, width, 3].
      config: `config.synthesis`.
      self_source: whether the image itself may be the content, as for objects; on what DiffusionAD
        lists as textures (and zipper) it takes foreign ones only.
      grey: whether everything that is pasted is grey, as the product is.
    """

    def __init__(
        self,
        size: tuple[int, int],
        textures: tf.Tensor,
        config: ConfigDict,
        self_source: bool,
        grey: bool = False,
    ):
        self._size, self._textures, self._config, self._grey = size, textures, config, grey
        self._window = 2 * round(_WINDOW * min(size) / 2) + 1
        self._min_pixels = max(1, round(config.min_area * size[0] * size[1]))
        self._noise = PerlinNoise(*size, config.perlin_max_exponent)
        self._self_chance = config.self_source if self_source else 0.0

    def __call__(
        self, image: tf.Tensor, foreground: tf.Tensor, contrast: tf.Tensor, seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Draws anew until the anomaly shows.

        Args:
          image: a normal image, uint8 [h, w, 3].
          foreground: where the product is, bool [h, w].
          contrast: half of the anomaly changes by so many grey levels more than
            `config.visible_change`, float32.
          seed: int32 [2].

        Returns:
          The image with anomalies, uint8 [h, w, 3], and where they are, bool [h, w]: those of the
          last attempt when all failed, and nowhere if even they were too small. Outside of it the
          image is the normal one.
        """
        share = self._config.visible_share
        least = self._config.visible_change
        plain = tf.cast(tf.math.ceil(least + contrast), tf.int32)

        def attempt(number, made, mask, shows):
            draws = Draws(tf.random.experimental.stateless_fold_in(seed, number))
            made, shape = self.once(image, foreground, draws)
            change = difference(image, made)
            mask = shown_part(change >= least, shape, share, self._window)
            area = count(mask)
            shows = (area >= self._min_pixels) & (area >= share * count(shape))
            return number + 1, made, mask, shows & (2 * count(mask & (change >= plain)) >= area)

        def unseen(number, made, mask, shows):
            return ~shows & (number < self._config.attempts)

        start = (tf.constant(0), image, tf.zeros_like(foreground), tf.constant(False))
        _, made, mask, _ = tf.while_loop(unseen, attempt, start)
        mask &= count(mask) >= self._min_pixels
        return tf.where(mask[..., None], made, image), mask

    def once(
        self, image: tf.Tensor, foreground: tf.Tensor, draws: Draws
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One attempt: the image with anomalies and their region, which may both be empty."""
        shape = self._shape(draws) & foreground
        opacity = draws.uniform(*self._config.simulated_opacity)
        return tf.cond(
            tf.reduce_any(shape),
            lambda: (blend(image, self._content(image, draws), shape, opacity), shape),
            lambda: (image, shape),
        )

    def _shape(self, draws: Draws) -> tf.Tensor:
        exponents = self._config.perlin_max_exponent + 1
        noise = self._noise(draws.seed(1), draws.integer(exponents), draws.integer(exponents))
        turned = augment.rotate(noise[..., None], draws.uniform(-math.pi / 2, math.pi / 2))
        return turned[..., 0] > self._config.perlin_threshold

    def _content(self, image: tf.Tensor, draws: Draws) -> tf.Tensor:
        texture = draws.integer(tf.shape(self._textures)[0])
        is_self = draws.chance(self._self_chance)
        source = tf.cond(is_self, lambda: image, lambda: tf.gather(self._textures, texture))
        source = augment.some_of_ten(source, draws, self._config.operations)
        source = to_grey(source) if self._grey else source
        order = draws.seed(2)
        return tf.cond(is_self, lambda: self._shuffle(source, order), lambda: source)

    def _shuffle(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Cuts the image into a grid and shuffles its columns, then its rows."""
        for axis, size in enumerate(self._size):
            cells = self._config.shuffle_grid
            order = tf.argsort(tf.random.stateless_uniform([cells], seed + axis))
            pixels = size // cells
            index = tf.reshape(order[:, None] * pixels + tf.range(pixels), [-1])
            # What does not divide stays where it is.
            index = tf.concat([index, tf.range(cells * pixels, size)], 0)
            image = tf.gather(image, index, axis=axis)
        return image


def roughness(images: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """How much neighbouring pixels differ by themselves: 1 on a smooth product, 8 on gravel.

    Args:
      images: uint8 [n, h, w, 3].
      foreground: where the product is, [n, h, w] in {0, 1}; what lies around it does not count.

    Returns:
      Median difference of horizontal neighbours' grey values, float32 [n]; 0 where there are none.
    """
    found = np.zeros(len(images), np.float32)
    for number, (image, on) in enumerate(zip(images, foreground)):
        pairs = (on[:, 1:] > 0) & (on[:, :-1] > 0)
        if pairs.any():
            found[number] = np.median(np.abs(np.diff(image.mean(-1, dtype=np.float32)))[pairs])
    return found
