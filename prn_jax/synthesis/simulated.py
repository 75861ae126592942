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
from prn_jax.synthesis.perlin import PerlinNoise


class Simulate:
    """Makes simulated anomalies for images of one size.

    Args:
      size: (height, width), pixels.
      textures: uint8 [n, height, width, 3].
      config: `config.synthesis`.
      self_source: whether the image itself may be the content, as for objects; on a texture
        DiffusionAD takes foreign textures only.
    """

    def __init__(
        self, size: tuple[int, int], textures: tf.Tensor, config: ConfigDict, self_source: bool
    ):
        self._size, self._textures, self._config = size, textures, config
        self._noise = PerlinNoise(*size, config.perlin_max_exponent)
        self._self_chance = config.self_source if self_source else 0.0

    def __call__(
        self, image: tf.Tensor, foreground: tf.Tensor, draws: Draws
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One attempt.

        Args:
          image: a normal image, uint8 [h, w, 3].
          foreground: where the product is, bool [h, w].
          draws: random numbers.

        Returns:
          The image with anomalies, uint8 [h, w, 3], and where they may show, bool [h, w]: both may
          turn out empty.
        """
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
        source = augment.three_of_ten(source, draws, self._config.operations)
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


def roughness(images: np.ndarray) -> np.ndarray:
    """How much neighbouring pixels differ by themselves: 1 on a smooth product, 8 on gravel.

    Args:
      images: uint8 [n, h, w, 3].

    Returns:
      Median difference of horizontal neighbours' grey values, float32 [n].
    """
    return np.array(
        [np.median(np.abs(np.diff(image.mean(-1, dtype=np.float32)))) for image in images],
        np.float32,
    )
