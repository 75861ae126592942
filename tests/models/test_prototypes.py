import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from sklearn.cluster import KMeans

from prn_jax import mesh as meshes
from prn_jax.models import prototypes


@pytest.fixture(scope="module")
def blobs():
    """60 points in 24 dimensions, around 6 well separated centres."""
    rng = np.random.default_rng(3)
    centres = 10 * rng.normal(size=(6, 24))
    return (centres.repeat(10, axis=0) + rng.normal(size=(60, 24))).astype(np.float32)


def inertia(points, centres):
    """Sum of the squared distances to the nearest centre, float64."""
    points, centres = np.asarray(points, np.float64), np.asarray(centres, np.float64)
    return np.square(points[:, None] - centres[None]).sum(-1).min(1).sum()


def lloyd(points, centres, iterations):
    """Lloyd's iterations from given centres, on one device."""
    mesh = meshes.create_mesh(jax.devices()[:1])
    run = functools.partial(prototypes._lloyd, iterations=iterations)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P())
    return jax.jit(mapped)(points, np.ones(len(points), bool), centres)


def test_lloyd_equals_scikit_learn_from_the_same_centres(blobs):
    start = blobs[::10] + 1.0
    ours = lloyd(blobs, start, iterations=50)
    theirs = KMeans(6, init=start, n_init=1, tol=0, algorithm="lloyd").fit(blobs)
    np.testing.assert_allclose(ours, theirs.cluster_centers_, atol=1e-5)


def test_lloyd_keeps_the_centre_of_an_empty_cluster(blobs):
    start = np.concatenate([blobs[::10], np.full((1, 24), 1e3, np.float32)])
    ours = lloyd(blobs, start, iterations=50)
    np.testing.assert_array_equal(ours[-1], start[-1])


def test_k_means_finds_separated_clusters(blobs):
    mesh = meshes.create_mesh(jax.devices()[:1])
    best = KMeans(6, n_init=10, random_state=0).fit(blobs).inertia_
    # k-means++ may split one cluster in two and merge others; it never ends far off.
    runs = [inertia(blobs, prototypes.k_means(blobs, 6, jax.random.key(i), mesh)) for i in range(5)]
    assert min(runs) == pytest.approx(best, rel=1e-4)


def test_seeds_are_drawn_in_proportion_to_squared_distance():
    # Three points on a line; the second seed's distribution follows from the first.
    points = np.float32([[0.0], [1.0], [3.0]])
    mesh = meshes.create_mesh(jax.devices()[:1])
    pairs = np.zeros((3, 3))
    for i in range(300):
        centres = prototypes.k_means(points, 2, jax.random.key(i), mesh, iterations=0)
        first, second = (int(np.abs(points[:, 0] - c).argmin()) for c in np.asarray(centres)[:, 0])
        pairs[first, second] += 1
    expected = np.array([[0, 1, 9], [1, 0, 4], [9, 4, 0]], float)
    expected /= 3 * expected.sum(1, keepdims=True)
    assert np.diag(pairs).sum() == 0
    chi_squared = (np.square(pairs / 300 - expected) / np.where(expected, expected, 1)).sum() * 300
    assert chi_squared < 20.5  # 5 degrees of freedom: p = 0.001


def test_nearest_and_residuals_equal_the_direct_computation():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5, 4, 6, 3)).astype(np.float32)
    maps = rng.normal(size=(7, 4, 6, 3)).astype(np.float32)
    f, m = jnp.asarray(features), jnp.asarray(maps)
    direct = np.square(features[:, None].astype(np.float64) - maps[None])
    index = direct.sum((2, 3, 4)).argmin(1)
    np.testing.assert_array_equal(prototypes.nearest(f, m), index)
    expected = direct[np.arange(5), index]
    np.testing.assert_allclose(prototypes.residuals(f, m), expected, rtol=1e-4, atol=1e-6)


def test_nearest_of_maps_with_a_large_mean():
    rng = np.random.default_rng(0)
    features, maps = (1000 + rng.normal(size=(n, 8, 8, 32)).astype(np.float32) for n in (20, 5))
    direct = np.square(features[:, None].astype(np.float64) - maps[None]).sum((2, 3, 4))
    found = prototypes.nearest(jnp.asarray(features), jnp.asarray(maps))
    np.testing.assert_array_equal(found, direct.argmin(1))


@pytest.mark.parametrize(("images", "k"), [(209, 20), (60, 6), (391, 39), (3, 1), (2085, 100)])
def test_number_of_prototypes(images, k):
    config = ConfigDict({"ratio": 0.1, "max_images": 1000})
    assert prototypes.num_prototypes(images, config) == k
