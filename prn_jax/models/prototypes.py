"""Multi-scale prototypes (the left third of Fig. 3): clustering, matching, residuals.

A prototype is a whole feature map, the mean of a cluster of the normal images' maps at one scale.
Each scale is clustered by itself, and each image is matched at each scale by itself; what the
rest of the network sees beside the features is the squared difference from the nearest prototype.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

# Products of distances need float32 even where the device's matrix unit would use less.
_EXACT = jax.lax.Precision.HIGHEST


def num_prototypes(num_images: int, config: ConfigDict) -> int:
    """K of one scale: a tenth of the normal images by default (PRNet), at least 1.

    Args:
      num_images: normal images to train on.
      config: `prototypes` of configs/default.py: of more than `max_images` they are made of some.
    """
    return max(1, int(config.ratio * min(num_images, config.max_images)))


def nearest(
    features: Float[Array, "b h w c"], prototypes: Float[Array, "k h w c"]
) -> Int[Array, " b"]:
    """Index of the prototype at the least L2 distance over the whole map.

    `argmin_k |p_k|^2 - 2 <f, p_k>` is one matrix product; the direct difference would need a
    tensor of b * k maps. Both are taken from the first prototype: long products of maps far from 0
    are rounded by more than two prototypes' distances may differ, otherwise by each runtime. (Their
    mean would do as well, but adds a quarter to the time that one image takes on a CPU.)
    """
    flat = features.reshape(features.shape[0], -1).astype(jnp.float32)
    centres = prototypes.reshape(prototypes.shape[0], -1)
    flat, centres = flat - centres[0], centres - centres[0]
    return jnp.argmin(_distances(flat, centres), axis=1)


def residuals(
    features: Float[Array, "b h w c"], prototypes: Float[Array, "k h w c"]
) -> Float[Array, "b h w c"]:
    """Element-wise squared difference from the nearest prototype, float32 (as PRNet)."""
    match = prototypes[nearest(features, prototypes)]
    return jnp.square(features.astype(jnp.float32) - match)


class PrototypeResidual(nn.Module):
    """One scale's prototypes: features -> residuals.

    The variable `maps` of the collection `prototypes`, [k, h, w, c] float32, is filled by
    `fitting.fit_prototypes`. Nothing is differentiated through it: the features are frozen.

    Attributes:
      num_prototypes: k.
    """

    num_prototypes: int

    def __call__(self, features: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return jax.lax.stop_gradient(residuals(features, self.maps(features)))

    @nn.compact
    def maps(self, features: Float[Array, "b h w c"]) -> Float[Array, "k h w c"]:
        """The stored maps, for features of this shape."""
        shape = (self.num_prototypes, *features.shape[1:])
        return self.variable("prototypes", "maps", jnp.zeros, shape, jnp.float32).value


def k_means(
    points: Float[Array | np.ndarray, "n d"],
    k: int,
    key: Array,
    mesh: Mesh,
    iterations: int = 50,
) -> Float[Array, "k d"]:
    """K-means with k-means++ seeding, sharded over the mesh axis `data`.

    Lloyd's iterations stop when no assignment changes. A cluster that loses all its points keeps
    its centre (scikit-learn would move it to the farthest point). The draw of a seed depends on
    the point's number, not on the device it lies on, so any number of devices starts alike.

    Args:
      points: flattened feature maps [n, d], float32.
      k: number of clusters, at most n.
      key: random key of the seeding.
      mesh: devices; n need not be divisible by their number.
      iterations: upper limit of Lloyd's iterations.

    Returns:
      Centres [k, d], float32, the same on each device.
    """
    count = points.shape[0]
    padding = -count % mesh.size
    points = jnp.pad(points.astype(jnp.float32), ((0, padding), (0, 0)))
    return _sharded_k_means(points, key, count, k, iterations, mesh)


@functools.partial(jax.jit, static_argnames=("count", "k", "iterations", "mesh"))
def _sharded_k_means(points, key, count, k, iterations, mesh):
    def run(points, key):
        first = jax.lax.axis_index("data") * points.shape[0]
        index = first + jnp.arange(points.shape[0])
        valid = index < count
        # Distances of centred points lose less to cancellation.
        mean = jax.lax.psum(jnp.sum(points, axis=0), "data") / count
        points = jnp.where(valid[:, None], points - mean, 0.0)
        centres = _seed(points, index, valid, key, k)
        centres = _lloyd(points, valid, centres, iterations)
        return centres + mean

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    return mapped(points, key)


def _distances(points: Array, centres: Array) -> Array:
    """Squared distances [n, k] less the points' own squared norms, which no argmin needs."""
    norms = jnp.sum(jnp.square(centres), axis=1)
    return norms - 2.0 * jnp.matmul(points, centres.T, precision=_EXACT)


def _seed(points: Array, index: Array, valid: Array, key: Array, k: int) -> Array:
    """k-means++: each next centre is drawn with probability in proportion to its distance^2."""

    def draw(weights: Array, key: Array) -> Array:
        # Gumbel-max: the greatest log weight plus noise is a draw in proportion to the weights.
        noise = jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i)))(index)
        score = jnp.where(valid, jnp.log(weights) + noise, -jnp.inf)
        best = jnp.argmax(score)
        top = jax.lax.pmax(score[best], "data")
        # Two devices tie only by chance of 2^-24; the lower number then wins.
        number = jnp.where(score[best] == top, index[best], jnp.iinfo(jnp.int32).max)
        chosen = index == jax.lax.pmin(number, "data")
        return jax.lax.psum(jnp.sum(jnp.where(chosen[:, None], points, 0.0), axis=0), "data")

    def step(i, carry):
        centres, least = carry
        centre = draw(jnp.maximum(least, 1e-30), jax.random.fold_in(key, i))
        distance = jnp.sum(jnp.square(points - centre), axis=1)
        return centres.at[i].set(centre), jnp.minimum(least, distance)

    first = draw(jnp.ones_like(points[:, 0]), jax.random.fold_in(key, 0))
    distance = jnp.sum(jnp.square(points - first), axis=1)
    centres = jnp.zeros((k, points.shape[1]), jnp.float32).at[0].set(first)
    return jax.lax.fori_loop(1, k, step, (centres, distance))[0]


def _lloyd(points: Array, valid: Array, centres: Array, iterations: int) -> Array:
    """Lloyd's iterations on one shard of the points; sums and counts by psum."""
    k = centres.shape[0]

    def assign(centres):
        return jnp.where(valid, jnp.argmin(_distances(points, centres), axis=1), k)

    def go_on(carry):
        i, _, _, changed = carry
        return (i < iterations) & changed

    def step(carry):
        i, centres, assignment, _ = carry
        member = jax.nn.one_hot(assignment, k, dtype=jnp.float32)
        sums = jax.lax.psum(jnp.matmul(member.T, points, precision=_EXACT), "data")
        counts = jax.lax.psum(jnp.sum(member, axis=0), "data")[:, None]
        centres = jnp.where(counts > 0, sums / jnp.maximum(counts, 1.0), centres)
        update = assign(centres)
        changed = jax.lax.psum(jnp.sum(update != assignment), "data") > 0
        return i + 1, centres, update, changed

    start = (0, centres, assign(centres), jnp.bool_(True))
    return jax.lax.while_loop(go_on, step, start)[1]
