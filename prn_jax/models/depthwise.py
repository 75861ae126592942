"""Convs with one filter per channel, for CPUs too, and their gradient in little memory."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k 1 c"],
    stride: int,
    padding: tuple[tuple[int, int], ...],
) -> Float[Array, "b h2 w2 c"]:
    """One k x k filter per channel, as a sum of shifted images.

    XLA fuses the sum into one pass over memory. On CPU its grouped convolution takes 20 to 60
    times as long; elsewhere both are bound by memory. Other runtimes have a kernel for the grouped
    one (`Conv.grouped`).

    Its gradient is written down, for JAX's own would keep the k x k shifted images.
    """
    places = kernel.reshape(-1, kernel.shape[-1])
    return sum(a * b for a, b in zip(_shifted(x, len(kernel), stride, padding), places))


def _shifted(
    x: Float[Array, "b h w c"], size: int, stride: int, padding: tuple[tuple[int, int], ...]
) -> list[Float[Array, "b h2 w2 c"]]:
    """What each place of a kernel is multiplied by, row by row."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    high, wide = ((n - size) // stride * stride + 1 for n in x.shape[1:3])
    return [
        x[:, i : i + high : stride, j : j + wide : stride] for i in range(size) for j in range(size)
    ]


def _depthwise_forward(x, kernel, stride, padding):
    return depthwise_conv(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride, padding, kept, gradient):
    x, kernel = kept
    size = len(kernel)
    # To the image: the kernel turned around, over the gradient spread to the image's places.
    spread = [
        (size - 1 - low, low + n - (m - 1) * stride - 1, stride - 1)
        for (low, _), n, m in zip(padding, x.shape[1:3], gradient.shape[1:3])
    ]
    zero = jnp.zeros((), gradient.dtype)
    spread = lax.pad(gradient, zero, [(0, 0, 0), *spread, (0, 0, 0)])
    to_x = depthwise_conv(spread, kernel[::-1, ::-1], 1, ((0, 0), (0, 0)))

    # To the kernel: the products with each shifted image, summed. First over rows, which on CPU
    # takes one pass for all of them; there XLA would write each shifted image down, to sum it.
    def separately(products):
        return [product.sum(1) for product in products]

    def in_one_pass(products):
        zeros = [jnp.zeros((), product.dtype) for product in products]
        return lax.reduce(products, zeros, lambda a, b: [x + y for x, y in zip(a, b)], (1,))

    exact = jnp.promote_types(gradient.dtype, jnp.float32)
    products = [y.astype(exact) * gradient for y in _shifted(x, size, stride, padding)]
    sums = jnp.stack(lax.platform_dependent(products, cpu=in_one_pass, default=separately))

    def weighted(kernel):  # its gradient, under shard_map too, where devices have other images
        return (sums * kernel.reshape(size * size, 1, 1, -1)).sum()

    return to_x, jax.grad(weighted)(kernel)


depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)
