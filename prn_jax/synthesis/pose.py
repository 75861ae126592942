"""Which flips and quarter turns a product's images could have been taken in: a texture has no pose.

The normal images themselves tell. Turned, an image without a pose is as near to the other normal
images as it was before; one that always lies alike is not. Measured on MVTec AD: grid is at most
1.03 times as far for all eight; bottle, pill and transistor are at least 1.3 times as far.
"""

import numpy as np
import tensorflow as tf
from scipy import spatial

Turn = tuple[int, bool]  # quarter turns against the clock, then whether left and right are swapped

_SIDE = 32  # pixels to which images are reduced: a pose is coarse
_MOST = 200  # images that are compared
_FARTHER = 1.1


def free_turns(images: np.ndarray, roi: np.ndarray | None = None) -> list[Turn]:
    """Finds the turns that leave normal images as near to one another as they are.

    Args:
      images: normal images, uint8 [n, h, w, 3].
      roi: the region of interest, [h, w], which a turn must leave as it is; None: there is none.

    Returns:
      The turns, of which the first changes nothing; quarter turns only of square images. From
      fewer than three images nothing can be told: the first alone.
    """
    identity = (0, False)
    if len(images) < 3:
        return [identity]
    chosen = images[np.linspace(0, len(images) - 1, min(len(images), _MOST)).astype(int)]
    small = tf.image.resize(chosen, (_SIDE, _SIDE), "area").numpy().mean(-1).astype(np.float64)
    quarters = range(4) if images.shape[1] == images.shape[2] else (0, 2)
    turns = [(quarter, mirrored) for quarter in quarters for mirrored in (False, True)]
    if roi is not None:
        turns = [x for x in turns if np.array_equal(_turned(roi[None], *x)[0], roi)]
    distance = {x: _to_nearest_other(_turned(small, *x), small) for x in turns}
    return [x for x in turns if distance[x] <= _FARTHER * distance[identity]]


def turn(image: tf.Tensor, turns: list[Turn], which: tf.Tensor) -> tf.Tensor:
    """Turns an image [h, w, c] by `turns[which]`."""

    def branch(quarter, mirrored):
        turned = tf.image.rot90(image, quarter)
        return tf.image.flip_left_right(turned) if mirrored else turned

    return tf.switch_case(which, [lambda x=x: branch(*x) for x in turns])


def _turned(images: np.ndarray, quarter: int, mirrored: bool) -> np.ndarray:
    """As `turn`, of [n, h, w]."""
    return np.flip(np.rot90(images, quarter, (1, 2)), 2 if mirrored else ())


def _to_nearest_other(images: np.ndarray, others: np.ndarray) -> float:
    """Median over i of the distance from `images[i]` to the nearest of `others[j]`, j != i."""
    distance = spatial.distance.cdist(*(x.reshape(len(x), -1) for x in (images, others)))
    np.fill_diagonal(distance, np.inf)
    return float(np.median(distance.min(axis=1)))
