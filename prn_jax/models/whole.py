"""Beyond the paper: which part of an image counts, and whether an image is of the product at all.

A map says where something is wrong with a product. It says little of another product, of a camera
that was moved or a lamp that has changed: those differ everywhere a little. What tells them is the
mean of each feature over the image, and of each colour: its distance from the nearest of a few such
means of normal images. (The distance of whole maps, which residuals are made of, tells another
product, but not the light: docs/experiments_use.md.)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8
from scipy import spatial

from prn_jax.models.prototypes import k_means

# The logit of what does not count: a map of 0, but for 1e-13.
OUTSIDE = -30.0
# Least spread of a feature, as a share of the size of its kind: of one image there is none.
_LEAST = 1e-3
# Of the distances whose logarithms' spread is a score's unit: at least so many images tell it, and
# it is at least so much. What is added to a distance, whose own logarithm is -inf for a copy.
_FEWEST, _LEAST_SPREAD, _NEAR = 10, 0.05, 0.1


class RegionOfInterest(nn.Module):
    """Where an image counts: the variable `mask` of the collection `prototypes`, uint8 [h, w]."""

    @nn.compact
    def __call__(self, height: int, width: int) -> UInt8[Array, "h w"]:
        if not self.has_variable("prototypes", "mask") and not self.is_initializing():
            return jnp.ones((height, width), jnp.uint8)  # a checkpoint of an earlier version
        return self.variable("prototypes", "mask", jnp.ones, (height, width), jnp.uint8).value


class WholeImage(nn.Module):
    """Descriptors -> distance from the nearest of the normal images' `centres`.

    In the variables `centres`, [k, d], and `spread`, [d], of the collection `prototypes`. The unit
    is about the root mean square distance of the training images: 1 is as normal images are.
    Without them (a checkpoint of an earlier version) it is 0.

    Attributes:
      num_centres: k.
      scores: whether the distance has a part in an image's score, by the variable `exponent`: see
        `raised`.
    """

    num_centres: int
    scores: bool = False

    @nn.compact
    def __call__(self, descriptor: Float[Array, "b d"]) -> Float[Array, " b"]:
        if not self.has_variable("prototypes", "centres") and not self.is_initializing():
            return jnp.zeros(descriptor.shape[0])
        size = descriptor.shape[1]
        shape = (self.num_centres, size)
        centres = self.variable("prototypes", "centres", jnp.zeros, shape, jnp.float32).value
        spread = self.variable("prototypes", "spread", jnp.ones, (size,), jnp.float32).value
        if self.scores:
            self.variable("prototypes", "exponent", jnp.zeros, (), jnp.float32)
        difference = descriptor[:, None] / spread - centres / spread
        return jnp.sqrt(jnp.min(jnp.sum(jnp.square(difference), axis=-1), axis=1))


def raised(scores: Any, distances: Any, exponent: Any) -> Any:
    """Scores whose logits are higher by `exponent` times the logarithm of the distance.

    Args:
      scores: [b], in [0, 1]; arrays of NumPy, JAX or TensorFlow.
      distances: [b], of `WholeImage`.
      exponent: the variable; None: the distance has no part in scores.
    """
    if exponent is None:
        return scores
    return scores / (scores + (1.0 - scores) * (distances + _NEAR) ** -exponent)


def exponent(distances: np.ndarray, seen: np.ndarray, weight: float) -> np.float32:
    """That by which a standard deviation of normal images' distances counts in a score's logit.

    It is half of what lies between the 16th and the 84th of a hundred: an image that is a centre by
    itself has no distance. It counts as far as the distance tells the seen anomalies from normal
    images: with the area under that ROC curve A, the share (2 A - 1)^2 of `weight`, which is little
    where they are told by chance (docs/experiments_use.md, 42).

    Args:
      distances: of the training images, [n]; of too few nothing can be told: 0.
      seen: of the seen anomalies, [m]; of none nothing can be told.
      weight: `score_distance`.
    """
    if len(distances) < _FEWEST or not len(seen):
        return np.float32(0.0)
    low, high = np.quantile(np.log(distances + _NEAR), (0.16, 0.84))
    above = np.sign(seen[:, None] - distances).mean()  # 2 A - 1
    return np.float32(weight * max(0.0, above) ** 2 / max(_LEAST_SPREAD, (high - low) / 2))


def describe(
    image: UInt8[Array, "b height width 3"],
    features: tuple[Array, ...],
    mask: UInt8[Array, "height width"] | UInt8[Array, "b height width"],
) -> Float[Array, "b d"]:
    """Means over the region of interest: of the colours, and of each scale's features.

    Args:
      image: the images.
      features: their maps [b, h, w, c], at whole fractions of the image's size.
      mask: the region of interest, of all images or of each.
    """
    means = []
    for x in (image.astype(jnp.float32), *features):
        height, width = x.shape[1:3]
        sides = height, mask.shape[-2] // height, width, mask.shape[-1] // width
        parts = mask.astype(jnp.float32).reshape(*mask.shape[:-2], *sides)
        weight = jnp.mean(parts, axis=(-3, -1))
        total = jnp.sum(x.astype(jnp.float32) * weight[..., None], axis=(1, 2))
        # [1], or [b, 1] where each image has its own.
        amount = jnp.sum(weight, axis=(-2, -1))[..., None]
        means.append(total / jnp.maximum(amount, 1e-6))
    return jnp.concatenate(means, axis=-1)


def fit_whole(
    descriptors: np.ndarray, channels: tuple[int, ...], k: int, key: Array, mesh: Mesh
) -> dict[str, np.ndarray]:
    """Clusters the descriptors of normal images.

    Args:
      descriptors: float32 [n, d].
      channels: how many of the d are of one kind (the colours, each scale): every kind counts the
        same.
      k: centres.
      key: random key.
      mesh: devices.

    Returns:
      `centres` and `spread` of `WholeImage`.
    """
    points = descriptors.astype(np.float64)
    kinds = np.repeat(np.arange(len(channels)), channels)
    size = [np.sqrt(np.mean(np.square(points[:, kinds == kind]))) for kind in range(len(channels))]
    least = _LEAST * np.array(size)[kinds] + 1e-6
    share = np.sqrt(len(channels) * np.array(channels)[kinds])

    def spread(difference: np.ndarray) -> np.ndarray:
        return share * np.maximum(np.sqrt(np.mean(np.square(difference), axis=0)), least)

    unit = spread(points - points.mean(axis=0))
    centres = np.asarray(jax.device_get(k_means((points / unit).astype(np.float32), k, key, mesh)))
    squared = spatial.distance.cdist(points / unit, centres, "sqeuclidean")
    centres = centres * unit
    within = spread(points - centres[np.argmin(squared, axis=1)])
    return {"centres": centres.astype(np.float32), "spread": within.astype(np.float32)}
