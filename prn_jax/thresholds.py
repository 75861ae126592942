"""Scores -> verdicts: from which score an image, and from which value a pixel, is anomalous.

Both are chosen apart, each from the best images there are for it, and each says from which:

1. Images of both classes (pixels: pixels of both): where F1 is highest, in the middle between the
   weakest score that is called anomalous and the next one below, so that rounding flips neither.
2. Normal images that were not trained on: the least threshold above all n of them. A further
   normal image scores higher than all n with a probability of at most 1 / (n + 1), whatever the
   distribution, for each of the n + 1 is as likely to be the highest (split conformal prediction:
   Vovk et al., Algorithmic Learning in a Random World, 2005).
3. Only images that were trained on: the least threshold above all of them. It promises nothing, for
   new images score higher than those; a warning says so.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from prn_jax import metrics

Thresholds = dict[str, Any]


def choose(
    scores: np.ndarray,
    labels: np.ndarray,
    maps: np.ndarray,
    masks: np.ndarray,
    trained_on: Callable[[], tuple[np.ndarray, np.ndarray]],
    known: np.ndarray | None = None,
) -> Thresholds:
    """Chooses both thresholds of one category.

    Args:
      scores: of the test images, float32 [n].
      labels: 1 for anomalous, 0 for normal, [n].
      maps: float32 [n, h, w].
      masks: 0 for a normal pixel, else anomalous, [n, h, w].
      trained_on: returns the maps and scores of the normal training images; called only where
        nothing else is left.
      known: whether an image's mask is known, [n]; default: of all. A mask of an anomalous image
        that marks nothing counts as unknown too.

    Returns:
      `image` and `pixel`, the thresholds, and for each in `basis`: `source` (which images, as
      text), `images` (how many) and `promise` (text).
    """
    normal = np.asarray(labels) == 0
    marked = np.array([mask.any() for mask in masks], bool)
    usable = (normal | marked) & (True if known is None else np.asarray(known, bool))
    image = pixel = None
    if len(scores) and 0 < normal.sum() < len(scores):
        image = _by_f1(scores, ~normal, len(scores))
    if marked[usable].any() and not masks[usable].all():
        pixel = _by_f1(maps[usable], masks[usable] != 0, int(usable.sum()))
    if normal.any():
        image = image or _above(scores[normal], int(normal.sum()))
        pixel = pixel or _above(maps[normal], int(normal.sum()))
    if image is None or pixel is None:
        train_maps, train_scores = trained_on()
        image = image or _above_trained("image", train_scores, len(train_scores))
        pixel = pixel or _above_trained("pixel", train_maps, len(train_scores))
    return {"image": image.pop("value"), "pixel": pixel.pop("value")} | {
        "basis": {"image": image, "pixel": pixel}
    }


def describe(thresholds: Thresholds, level: str = "image") -> str:
    """Where a threshold comes from and what it promises, as one line."""
    basis = thresholds["basis"][level]
    return f"{basis['source']}: {basis['promise']}"


def _by_f1(values: np.ndarray, anomalous: np.ndarray, count: int) -> dict[str, Any]:
    """In the middle of the gap below the weakest value that F1-max calls anomalous."""
    _, least = metrics.f1_max(metrics.rank_images(values.ravel(), anomalous.ravel()))
    kept = values.min(where=values >= least, initial=np.inf)
    below = values.max(where=values < least, initial=0.0)  # nothing scores less than 0
    middle = values.dtype.type((float(below) + float(kept)) / 2)
    # Of two neighbouring numbers the upper one: the middle would be rounded to either.
    return {
        "value": float(middle if middle > below else kept),
        "source": f"F1-max on {count} test images",
        "images": count,
        "promise": "the best on these images; others may differ",
    }


def _above(values: np.ndarray, count: int) -> dict[str, Any]:
    return {
        "value": float(np.nextafter(values.max(), values.dtype.type(np.inf))),
        "source": f"above all {count} normal test images",
        "images": count,
        "promise": f"of normal images like them, on average at most 1 of {count + 1} is higher",
    }


def _above_trained(level: str, values: np.ndarray, count: int) -> dict[str, Any]:
    basis = _above(values, count) | {
        "source": f"above all {count} images that were trained on",
        "promise": "none, for new normal images score higher than these: expect false alarms",
    }
    logging.warning(
        "the %s threshold, %.4f, lies %s, as there are no others: new normal images score higher, "
        "so expect false alarms; put normal images that are not trained on into test/good",
        level, basis["value"], basis["source"],
    )  # fmt: skip
    return basis
