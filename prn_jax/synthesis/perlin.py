"""Perlin noise, the shape of simulated anomalies (DRAEM; DiffusionAD, same first author as PRN).

Perlin noise interpolates, between the nodes of a grid, the products of a random gradient at each
node with the way from the node to the pixel. The interpolation separates into rows and columns, so
the noise of a whole image is two small matrix products.
"""

import math

import numpy as np
import tensorflow as tf


class PerlinNoise:
    """Noise of one image size, for grids of 2**0 .. 2**max_exponent cells per axis.

    Args:
      height: pixels.
      width: pixels.
      max_exponent: of the finest grid (DRAEM: 5, 32 cells).
    """

    def __init__(self, height: int, width: int, max_exponent: int = 5):
        self._nodes = 2**max_exponent + 1
        self._rows = _node_weights(height, max_exponent)
        self._columns = _node_weights(width, max_exponent)

    def __call__(self, seed: tf.Tensor, row_exponent: tf.Tensor, column_exponent: tf.Tensor):
        """One field of noise.

        Args:
          seed: int32 [2].
          row_exponent: log2 of the cells from top to bottom, int32 scalar.
          column_exponent: log2 of the cells from left to right, int32 scalar.

        Returns:
          float32 [h, w], within about [-1, 1].
        """
        angle = tf.random.stateless_uniform([self._nodes, self._nodes], seed, maxval=2.0 * math.pi)
        near_rows, way_rows = (tf.gather(x, row_exponent) for x in self._rows)
        near_columns, way_columns = (tf.gather(x, column_exponent) for x in self._columns)
        down = tf.matmul(tf.matmul(way_rows, tf.sin(angle)), near_columns, transpose_b=True)
        across = tf.matmul(tf.matmul(near_rows, tf.cos(angle)), way_columns, transpose_b=True)
        return math.sqrt(2.0) * (down + across)


def _node_weights(size: int, max_exponent: int) -> tuple[tf.Tensor, tf.Tensor]:
    """For each exponent: how much each node counts at each pixel, and that times the way to it.

    Both are [exponents, size, nodes], 0 for all nodes but the two beside the pixel.
    """
    nodes = 2**max_exponent + 1
    near = np.zeros((max_exponent + 1, size, nodes), np.float32)
    way = np.zeros_like(near)
    pixels = np.arange(size)
    for exponent in range(max_exponent + 1):
        place = pixels * 2**exponent / size
        cell = np.floor(place).astype(int)
        offset = place - cell
        fade = offset**3 * (offset * (offset * 6 - 15) + 10)
        near[exponent, pixels, cell] = 1 - fade
        near[exponent, pixels, cell + 1] = fade
        way[exponent, pixels, cell] = (1 - fade) * offset
        way[exponent, pixels, cell + 1] = fade * (offset - 1)
    return tf.constant(near), tf.constant(way)
