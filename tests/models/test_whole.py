"""What is said of an image as a whole, and where it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from sklearn import metrics

from prn_jax import mesh as meshes
from prn_jax.models.prn import PRN
from prn_jax.models.whole import WholeImage, describe, exponent, fit_whole, raised


def drawn(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_distance_is_that_from_the_nearest_centre():
    centres, points = drawn((5, 7)), drawn((9, 7), 1)
    spread = np.abs(drawn(7, 2)) + 0.1
    variables = {"prototypes": {"centres": centres, "spread": spread}}
    found = WholeImage(5).apply(variables, jnp.asarray(points))
    pairs = (points[:, None].astype(np.float64) - centres) / spread
    np.testing.assert_allclose(found, np.linalg.norm(pairs, axis=-1).min(axis=1), rtol=1e-5)
    # A checkpoint of before there were any.
    assert not WholeImage(5).apply({"prototypes": {}}, jnp.asarray(points)).any()


def test_a_standard_deviation_of_the_distance_raises_a_score_by_so_many_logits():
    scores, distances = np.array([0.0, 0.2, 0.5, 0.99, 1.0]), np.array([3.0, 0.4, 1.0, 50.0, 2.0])
    normal = np.exp(0.3 * drawn(20_000)).astype(np.float64) - 0.1
    normal[:200] = 0  # an image that is a centre
    far = np.full(3, 9.0)
    power = exponent(normal, far, 0.6)
    assert power == pytest.approx(0.6 / 0.3, rel=0.03)
    logits = special.logit(scores) + power * np.log(distances + 0.1)
    found = raised(jnp.float32(scores), jnp.float32(distances), power)
    np.testing.assert_allclose(found, special.expit(logits), rtol=1e-5)
    np.testing.assert_array_equal(raised(scores, distances, 0.0), scores)
    # Beyond all numbers of float32 it is 0 or 1.
    found = raised(jnp.float32([0.3, 0.3]), jnp.float32([300.0, 0.0]), np.float32(60.0))
    np.testing.assert_allclose(found, [1, 0], atol=1e-6)
    # The least that is told apart, and too few to tell.
    assert exponent(np.ones(10), far, 0.6) == pytest.approx(0.6 / 0.05)
    assert exponent(normal[:9], far, 0.6) == 0


@pytest.mark.parametrize("shift", [-1.0, 0.5, 2.0])
def test_a_distance_counts_as_far_as_it_tells_the_seen_anomalies(shift):
    normal, seen = np.exp(drawn(200)), np.exp(shift + drawn(9, 1))
    normal[:20] = seen[0]  # as far as one another
    area = metrics.roc_auc_score(np.repeat([0, 1], [200, 9]), np.concatenate([normal, seen]))
    assert (area > 0.5) == (shift > 0)
    share, fully = max(0.0, 2 * area - 1) ** 2, exponent(normal, np.full(1, 1e9), 0.3)
    assert exponent(normal, seen, 0.3) == pytest.approx(share * fully)
    assert exponent(normal, seen[:0], 0.3) == 0


def test_a_description_is_the_mean_of_what_counts():
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    features = drawn((2, 4, 4, 5)), drawn((2, 2, 2, 6), 1)
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, 2:] = 1
    found = np.asarray(describe(*jax.tree.map(jnp.asarray, (image, features, mask))))
    # Each feature weighs as many pixels as it stands for.
    large = [np.kron(x, np.ones((1, 8 // x.shape[1], 8 // x.shape[1], 1))) for x in features]
    expected = np.concatenate([x[:, :4, 2:].mean(axis=(1, 2)) for x in (image, *large)], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_training_images_are_at_a_distance_of_about_one(count):
    channels = (3, 8, 16)
    points = 5 + drawn((count, 27)) * np.logspace(-2, 1, 27, dtype=np.float32)
    mesh = meshes.create_mesh(jax.devices()[:1])
    fitted = fit_whole(points, channels, max(1, count // 10), jax.random.key(0), mesh)
    distances = WholeImage(1).apply({"prototypes": fitted}, jnp.asarray(points))
    assert np.isfinite(distances).all()
    if count > 2:
        assert np.sqrt(np.mean(np.square(distances))) == pytest.approx(1, abs=0.1)
    far = WholeImage(1).apply({"prototypes": fitted}, jnp.asarray(points + 100 * fitted["spread"]))
    assert (far > 10 * (distances + 1)).all()


def test_what_does_not_count_is_neither_in_the_map_nor_in_the_distance():
    model = PRN(trained=False, num_patches=4, memory_scales=(1,))
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(0, 256, (1, 64, 64, 3), np.uint8))
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), image))
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 16:48] = 1
    mask = jnp.asarray(mask)
    prototypes = variables["prototypes"] | {"interest": {"mask": mask}}
    step = jax.jit(lambda variables, image: model.apply(variables, image, method="inspect"))
    everywhere, _ = step(variables, image)
    inside, distance = step(variables | {"prototypes": prototypes}, image)
    np.testing.assert_array_equal(inside[0, mask > 0], everywhere[0, mask > 0])
    assert (jax.nn.sigmoid(inside[0, mask == 0]) < 1e-12).all()
    # The colour outside of it has no part in the distance's own means.
    colours = model.apply(variables | {"prototypes": prototypes}, image, method="descriptor")
    np.testing.assert_allclose(
        colours[0, :3], image[0, 8:40, 16:48].mean(axis=(0, 1)), rtol=1e-4
    )  # fmt: skip
    assert jnp.isfinite(distance).all()
