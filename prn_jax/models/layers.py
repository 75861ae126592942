"""Small pieces that several blocks share: a conv, a conv with batch norm, and x2 upsampling."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Dtype = Any
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


def batch_norm(train: bool, dtype: Dtype) -> nn.BatchNorm:
    """Batch norm by the batch's statistics (`train`) or by running ones.

    The batch is the global one, over all devices of the mesh axis `data`, so that one device and
    eight compute the same function.
    """
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name="data", dtype=dtype)


class ConvNormReLU(nn.Module):
    """3x3 conv, batch norm, ReLU.

    Attributes:
      features: output channels.
      dtype: compute type; statistics and parameters are float32.
    """

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w o"]:
        x = nn.Conv(self.features, (3, 3), use_bias=False, kernel_init=he_normal, dtype=self.dtype)(
            x
        )
        return nn.relu(batch_norm(train, self.dtype)(x))


def _matmul(x: Array, kernel: Array, *_, precision: Any = None, **__) -> Array:
    """A 1x1 conv as the matrix product that it is: XLA differentiates that five times as fast."""
    return jnp.matmul(x, kernel[0, 0], precision=precision)


def conv1x1(features: int, dtype: Dtype, name: str | None = None) -> nn.Conv:
    """A conv of one place, with bias."""
    return nn.Conv(features, (1, 1), dtype=dtype, conv_general_dilated=_matmul, name=name)


def upsample(
    x: Float[Array, "b h w c"], doublings: int = 1, unfused: bool = False
) -> Float[Array, "b h2 w2 c"]:
    """Bilinear upsampling by two, `doublings` times, with half-pixel centres.

    Written as two weighted shifts per axis: XLA fuses them into one pass over memory, where a
    general resize multiplies by a dense matrix. To a runtime that fuses nothing they are 30
    operators, and the matrix is the faster.

    Args:
      x: maps [b, h, w, c].
      doublings: how many times height and width double.
      unfused: as products with matrices instead.

    Returns:
      Maps [b, h * 2**doublings, w * 2**doublings, c].
    """
    if unfused and doublings:
        rows, columns = (_doubling(size, doublings).astype(x.dtype) for size in x.shape[1:3])
        x = jnp.matmul(columns, x)
        return jnp.matmul(rows, x.swapaxes(1, 2)).swapaxes(1, 2)
    for _ in range(doublings):
        x = _double(_double(x, axis=1), axis=2)
    return x


def resized(
    x: Float[Array, "b h w c"], doublings: int, unfused: bool = False
) -> Float[Array, "b h2 w2 c"]:
    """Maps doubled so many times, see `upsample`; below 0 halved, by means over 2x2 pixels."""
    if doublings >= 0:
        return upsample(x, doublings, unfused)
    batch, height, width, channels = x.shape
    side = 2**-doublings
    return x.reshape(batch, height // side, side, width // side, side, channels).mean(axis=(2, 4))


def _double(x: Array, axis: int) -> Array:
    """Doubles one spatial axis: each pixel yields two, a quarter pixel to either side of it."""
    size = x.shape[axis]
    first = jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    last = jax.lax.slice_in_dim(x, size - 1, size, axis=axis)
    before = jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, size - 1, axis=axis)], axis)
    after = jnp.concatenate([jax.lax.slice_in_dim(x, 1, size, axis=axis), last], axis)
    pair = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=axis + 1)
    return pair.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


def _doubling(size: int, times: int) -> np.ndarray:
    """What `_double`, so many times over, multiplies an axis of that size by, NumPy."""
    matrix = np.eye(size)
    for _ in range(times):
        places = np.arange(len(matrix))
        before, after = np.maximum(places - 1, 0), np.minimum(places + 1, places[-1])
        pair = [0.75 * matrix + 0.25 * matrix[before], 0.75 * matrix + 0.25 * matrix[after]]
        matrix = np.stack(pair, axis=1).reshape(-1, size)
    return matrix
