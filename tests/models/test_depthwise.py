import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from prn_jax import mesh as meshes
from prn_jax.models.depthwise import depthwise_conv


@pytest.mark.parametrize("shape", [(7, 10), (5, 3)])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("padding", [(2, 1), (0, 2)])
def test_its_gradient_is_that_of_xla_s(size, stride, shape, padding):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, *shape, 3)), rng.normal(size=(size, size, 1, 3))
    padding = (padding, padding)

    def grouped(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=layout, feature_group_count=3
        )

    weights = rng.normal(size=jax.eval_shape(grouped, x, kernel).shape)

    def ours(x, kernel):
        return depthwise_conv(x, kernel, stride, padding)

    def gradients(conv):
        return jax.jit(jax.grad(lambda *given: (conv(*given) * weights).sum(), (0, 1)))(x, kernel)

    with jax.enable_x64(True):
        x, kernel = jnp.array(x), jnp.array(kernel)
        found, expected = gradients(ours), gradients(grouped)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_its_gradient_keeps_no_shifted_images():
    x, kernel = jnp.ones((2, 16, 16, 64)), jnp.ones((5, 5, 1, 64))

    def loss(x, kernel):
        y = depthwise_conv(jnp.sin(x), kernel, 1, ((2, 2), (2, 2)))
        return jnp.square(y).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * x.nbytes  # not 25


def test_its_gradient_sums_over_the_devices_that_have_other_images():
    mesh = meshes.create_mesh()
    x = jnp.array(np.random.default_rng(0).normal(size=(2 * mesh.size, 6, 5, 3)), jnp.float32)
    kernel = jnp.full((3, 3, 1, 3), 0.5)

    def gradient(x, kernel):
        return jax.grad(lambda k: jnp.square(depthwise_conv(x, k, 1, ((1, 1), (1, 1)))).sum())(
            kernel
        )

    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    np.testing.assert_allclose(jax.jit(mapped)(x, kernel), gradient(x, kernel), rtol=1e-5)
