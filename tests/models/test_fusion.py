import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from prn_jax.models.fusion import MultiScaleFusion
from prn_jax.models.layers import upsample

SHAPES = ((2, 16, 24, 4), (2, 8, 12, 6), (2, 4, 6, 8))


@pytest.mark.parametrize("doublings", [1, 2])
def test_upsample_of_a_plane_is_exact_inside(doublings):
    # Bilinear interpolation reproduces a plane away from the border.
    rows, columns = np.mgrid[:8, :10]
    plane = (2.0 * rows - 3.0 * columns + 1.0)[None, :, :, None].astype(np.float32)
    up = np.asarray(upsample(jnp.asarray(plane), doublings))[0, :, :, 0]
    factor = 2**doublings
    rows, columns = (np.mgrid[: up.shape[0], : up.shape[1]] + 0.5) / factor - 0.5
    expected = 2.0 * rows - 3.0 * columns + 1.0
    inner = (slice(factor, -factor),) * 2
    np.testing.assert_allclose(up[inner], expected[inner], atol=1e-5)


def test_upsample_equals_scipy():
    x = np.random.default_rng(0).normal(size=(5, 7))
    centres = [(np.arange(2 * n) + 0.5) / 2 - 0.5 for n in x.shape]
    grid = np.meshgrid(*centres, indexing="ij")
    expected = ndimage.map_coordinates(x, grid, order=1, mode="nearest")
    ours = upsample(jnp.float32(x)[None, :, :, None])[0, :, :, 0]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("doublings", [0, 1, 3])
def test_products_double_as_shifts_do(doublings):
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
    products = upsample(x, doublings, unfused=True)
    np.testing.assert_allclose(products, upsample(x, doublings), atol=1e-6)


def test_each_scale_receives_each_scale():
    maps = tuple(jax.random.normal(jax.random.key(i), s) for i, s in enumerate(SHAPES))
    block = MultiScaleFusion()
    apply = jax.jit(block.apply)
    variables = jax.jit(block.init)(jax.random.key(9), maps)
    out = apply(variables, maps)
    assert tuple(x.shape for x in out) == SHAPES
    for source in range(3):
        changed = tuple(x + (i == source) for i, x in enumerate(maps))
        for before, after in zip(out, apply(variables, changed)):
            assert np.abs(before - after).max() > 1e-3


def test_no_block_is_only_the_skip():
    # With all convs zero the sum is each scale itself.
    maps = tuple(jax.random.normal(jax.random.key(i), s) for i, s in enumerate(SHAPES))
    block = MultiScaleFusion()
    variables = jax.tree.map(jnp.zeros_like, jax.jit(block.init)(jax.random.key(9), maps))
    for before, after in zip(maps, jax.jit(block.apply)(variables, maps)):
        np.testing.assert_array_equal(before, after)
