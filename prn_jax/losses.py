"""The loss of PRN: smooth L1 plus focal, between the anomaly map and the mask (Fig. 3).

All are written in terms of the logits, so that none over- or underflows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def smooth_l1(logits: Float[Array, "b h w"], mask: Float[Array, "b h w"]) -> Float[Array, ""]:
    """Mean smooth L1 (Huber, beta 1) between sigmoid(logits) and the mask.

    Two probabilities never differ by more than 1, so only the quadratic half of it is ever used.
    """
    return 0.5 * jnp.mean(jnp.square(jax.nn.sigmoid(logits) - mask))


def focal(
    logits: Float[Array, "b h w"],
    mask: Float[Array, "b h w"],
    alpha: float = 0.5,
    gamma: float = 4.0,
) -> Float[Array, ""]:
    """Mean binary focal loss, `-alpha_t (1 - p_t)^gamma log p_t` (Lin et al. 2017).

    Args:
      logits: [b, h, w], before the sigmoid.
      mask: [b, h, w] in {0, 1}.
      alpha: weight of the anomalous pixels; the normal ones weigh 1 - alpha.
      gamma: how much well-classified pixels are played down.
    """
    towards_truth = jnp.where(mask > 0.5, logits, -logits)
    weight = jnp.where(mask > 0.5, alpha, 1.0 - alpha)
    missing = jax.nn.sigmoid(-towards_truth)
    return jnp.mean(-weight * missing**gamma * jax.nn.log_sigmoid(towards_truth))


def dice(
    logits: Float[Array, "b h w"],
    mask: Float[Array, "b h w"],
    total: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, ""]:
    """Dice loss of the whole batch, `1 - 2 |p m| / (|p| + |m|)` (V-Net, Milletari et al. 2016).

    Of all images together, for one without an anomaly has no overlap; with 1 added above and below.

    Args:
      logits: [b, h, w], before the sigmoid.
      mask: [b, h, w] in {0, 1}.
      total: sums over the devices that share the batch.
    """
    probability = jax.nn.sigmoid(logits)
    overlap = total(jnp.sum(probability * mask))
    return 1.0 - (2.0 * overlap + 1.0) / (total(jnp.sum(probability) + jnp.sum(mask)) + 1.0)
