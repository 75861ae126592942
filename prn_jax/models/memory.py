"""Normal patches that are found anywhere: beyond the paper, by config, beside its prototypes.

A prototype is a whole map and compares a place with the same place. What lies elsewhere from image
to image is compared here (a) with a window of places of the stored maps, or (b) with a memory of
patches of all normal images, chosen as PatchCore does (CVPR 2022, arXiv 2106.08265): features
averaged over 3x3 places, a greedy coreset of them. With (b) the distance alone is an anomaly map,
without any training.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from prn_jax.models.layers import upsample

# Products of distances need float32 even where the device's matrix unit would use less.
_EXACT = jax.lax.Precision.HIGHEST
# Patches compared at a time: bounds the table of distances, [b * h * w, _CHUNK].
_CHUNK = 1024
# The coreset is drawn from at most so many patches of a scale, at random: 50 s of one core for
# 4,096 of 60,000. PatchCore projects onto 128 random directions to choose it; so does this.
_CANDIDATES, _DIRECTIONS = 60_000, 128
# Standard deviation in pixels of the Gaussian that smooths a map of distances (PatchCore).
_SIGMA = 4.0


def average(features: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Mean over 3x3 places, zero outside (PatchCore), float32."""
    return nn.avg_pool(features.astype(jnp.float32), window_shape=(3, 3), padding="SAME")


def nearest_patch(points: Float[Array, "n c"], patches: Float[Array, "m c"]) -> Int[Array, " n"]:
    """Index of the patch at the least L2 distance: one matrix product, in parts."""
    least = jnp.full_like(points[:, 0], jnp.inf)
    index = jnp.zeros_like(least, jnp.int32)
    for start in range(0, patches.shape[0], _CHUNK):
        part = patches[start : start + _CHUNK]
        product = jnp.matmul(points, part.T, precision=_EXACT)
        distance = jnp.sum(jnp.square(part), axis=1) - 2.0 * product
        found = jnp.min(distance, axis=1)
        number = start + jnp.argmin(distance, axis=1).astype(jnp.int32)
        index = jnp.where(found < least, number, index)
        least = jnp.minimum(found, least)
    return index


class PatchResidual(nn.Module):
    """One scale's memory: features -> squared difference from the nearest patch, anywhere.

    The variable `patches` of the collection `prototypes`, [m, c] float32, is filled by
    `fitting.fit_prototypes`.

    Attributes:
      num_patches: m.
    """

    num_patches: int

    @nn.compact
    def __call__(self, features: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        shape = (self.num_patches, features.shape[-1])
        patches = self.variable("prototypes", "patches", jnp.zeros, shape, jnp.float32).value
        points = average(features).reshape(-1, features.shape[-1])
        residual = jnp.square(points - patches[nearest_patch(points, patches)])
        return jax.lax.stop_gradient(residual.reshape(features.shape))


class PatchMap(nn.Module):
    """Residuals of several scales -> logits, so that `sigmoid` is monotone in the distance d.

    The map is d / (d + r), with r the distance at a normal image's farthest place, on average: the
    variable `reference` of the collection `prototypes`. So logit = log(d / r).

    Attributes:
      unfused: see `layers.upsample`.
    """

    unfused: bool = False

    @nn.compact
    def __call__(
        self, residuals: tuple[Float[Array, "..."], ...], doublings: tuple[int, ...]
    ) -> Float[Array, "b height width"]:
        """Logits of residuals, each brought to the size of the image by so many doublings."""
        reference = self.variable("prototypes", "reference", jnp.ones, (), jnp.float32).value
        finest = min(doublings)
        squared = sum(
            upsample(jnp.sum(x, axis=-1, keepdims=True), n - finest, self.unfused)
            for x, n in zip(residuals, doublings)
        )
        distance = _smooth(upsample(jnp.sqrt(squared), finest, self.unfused))[..., 0]
        return jnp.log(jnp.maximum(distance, 1e-12) / reference)


def window_residuals(
    features: Float[Array, "b h w c"], maps: Float[Array, "k h w c"], window: int
) -> Float[Array, "b h w c"]:
    """Squared difference from the nearest of k stored maps within a window of places, float32.

    Args:
      features: of the images.
      maps: stored ones.
      window: side in places, odd; 1 compares each place with the same place of all maps.
    """
    features = features.astype(jnp.float32)
    reach, (height, width) = window // 2, features.shape[1:3]
    least = jnp.full_like(features[..., 0], jnp.inf)
    best = jnp.zeros_like(features)
    padding = ((0, 0), (reach, reach), (reach, reach))
    padded = jnp.pad(maps, (*padding, (0, 0)))
    # Beyond the border is nothing to be near to.
    norms = jnp.pad(jnp.sum(jnp.square(maps), -1), padding, constant_values=jnp.inf)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    for i in range(window):
        for j in range(window):
            shifted = padded[:, i : i + height, j : j + width]
            product = jnp.einsum("bhwc,khwc->bhwk", features, shifted, precision=_EXACT)
            norm = norms[:, i : i + height, j : j + width].transpose(1, 2, 0)
            distance = norm - 2.0 * product
            number = jnp.argmin(distance, axis=-1)
            found = jnp.min(distance, axis=-1)
            nearer = found < least
            best = jnp.where(nearer[..., None], shifted[number, rows, columns], best)
            least = jnp.where(nearer, found, least)
    return jax.lax.stop_gradient(jnp.square(features - best))


def _smooth(x: Float[Array, "b h w 1"]) -> Float[Array, "b h w 1"]:
    """Gaussian filter, cut off at 4 standard deviations, mirrored at the border (as SciPy)."""
    reach = int(4 * _SIGMA + 0.5)
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / _SIGMA))
    weights = jnp.asarray(weights / weights.sum(), jnp.float32)
    for axis in (1, 2):
        padding = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        shape = [-1 if i == axis - 1 else 1 for i in range(4)]
        x = jax.lax.conv_general_dilated(
            jnp.pad(x, padding, mode="symmetric"),
            weights.reshape(shape),
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_EXACT,
        )
    return x


# --- filling it -----------------------------------------------------------------------------------


def choose_patches(maps: np.ndarray, count: int, seed: int) -> np.ndarray:
    """A greedy coreset of the patches of normal images.

    Args:
      maps: one scale's features, float32 [n, h, w, c].
      count: patches to choose; at most half of those there are, for an image that is stored whole
        says nothing of how far a normal one is from others. Some are then stored more than once.
      seed: of the candidates and of the projection.

    Returns:
      Patches [count, c], float32; the same on every process that is given the same maps.
    """
    rng = np.random.default_rng(seed)
    places, channels = math.prod(maps.shape[:3]), maps.shape[-1]
    chosen = np.sort(rng.permutation(places)[:_CANDIDATES])
    per_image = places // len(maps)
    points = np.concatenate(
        [
            np.asarray(_average(maps[i : i + 1])).reshape(-1, channels)[
                chosen[chosen // per_image == i] % per_image
            ]
            for i in range(len(maps))
        ]
    )
    projected = points
    if channels > _DIRECTIONS:
        directions = rng.normal(size=(channels, _DIRECTIONS)) / math.sqrt(_DIRECTIONS)
        projected = points @ directions.astype(np.float32)
    different = min(count, -(-len(points) // 2))
    return points[np.resize(np.asarray(greedy_coreset(projected, different)), count)]


@functools.partial(jax.jit, static_argnames="count")
def greedy_coreset(points: Float[Array | np.ndarray, "n d"], count: int) -> Int[Array, " count"]:
    """k-center greedy: each next point is the one farthest from those chosen so far.

    The first is the one nearest to the mean. Takes `count` passes over the points and no more
    memory than they do.

    Returns:
      Indices of the points.
    """
    # Distances of centred points lose less to cancellation.
    points = points - jnp.mean(points, axis=0)
    norms = jnp.sum(jnp.square(points), axis=1)

    def distances(i):
        product = jnp.matmul(points, points[i], precision=_EXACT)
        return jnp.maximum(norms - 2.0 * product + norms[i], 0.0).at[i].set(0.0)

    def step(i, carry):
        chosen, least = carry
        farthest = jnp.argmax(least).astype(jnp.int32)
        return chosen.at[i].set(farthest), jnp.minimum(least, distances(farthest))

    first = jnp.argmin(norms).astype(jnp.int32)
    chosen = jnp.zeros(count, jnp.int32).at[0].set(first)
    return jax.lax.fori_loop(1, count, step, (chosen, distances(first)))[0]


_average = jax.jit(average)
