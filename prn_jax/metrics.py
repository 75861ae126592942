"""How good anomaly scores and anomaly maps are: AUROC, AP, F1-max and PRO (PRN's tables).

Conventions, for images and for pixels alike:

- A higher score is more anomalous; an image or pixel is called anomalous where score >= threshold.
- Equal scores share one threshold: a tie is never split, whatever the order of the input.
- Pixels are pooled over the whole test split of a category before anything is counted.
- AUROC is the area by the trapezoidal rule; AP (average precision) is the sum of precision times
  recall step, without interpolation. Both equal scikit-learn's.
- F1-max is the highest F1 over all thresholds.
- PRO (per-region overlap, AUPRO) averages the covered share of every defect region, a region being
  an 8-connected part of one image's mask, against the false positive rate over all normal pixels of
  all images, normal images included. It is exact over all thresholds, integrated linearly up to a
  false positive rate of 0.3 and divided by 0.3, as MVTec's official evaluation does. Holes of a
  region stay holes.
- A figure that one class alone cannot define is None.

Everything is read off one `Ranking`, the counts at every threshold that matters, so that the
pixels of a test split are sorted once.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy import ndimage

from prn_jax import disk

PRO_FPR_LIMIT = 0.3

# Both axes of a curve, [t] each.
Points = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Counts at the thresholds that matter, from the strictest to the laxest.

    Between two anomalous scores only the normal ones accumulate: every curve is straight there, so
    its inner points are left out. That leaves at most two points per distinct anomalous score.

    Attributes:
      threshold: [t], descending; the first is inf, where nothing is called anomalous.
      tp: [t] anomalous items with score >= threshold.
      fp: [t] normal items with score >= threshold.
      overlap: [t] mean covered share of the regions, in [0, 1]; None where there are no regions.
      positives: anomalous items in all.
      negatives: normal items in all.
    """

    threshold: Float[np.ndarray, " t"]
    tp: Integer[np.ndarray, " t"]
    fp: Integer[np.ndarray, " t"]
    overlap: Float[np.ndarray, " t"] | None
    positives: int
    negatives: int

    @property
    def defined(self) -> bool:
        """Whether both classes occur."""
        return self.positives > 0 and self.negatives > 0


def rank_images(
    scores: Float[np.ndarray, " n"], labels: Integer[np.ndarray, " n"] | Bool[np.ndarray, " n"]
) -> Ranking:
    """Ranks images.

    Args:
      scores: [n], higher is more anomalous.
      labels: [n], 0 normal, anything else anomalous.

    Raises:
      ValueError: shapes differ, or a score is NaN.
    """
    return _rank(scores, labels != 0, None)


def rank_pixels(
    maps: Float[np.ndarray, "n h w"],
    masks: Integer[np.ndarray, "n h w"] | Bool[np.ndarray, "n h w"],
    roi: Integer[np.ndarray, "h w"] | None = None,
    known: Bool[np.ndarray, " n"] | None = None,
) -> Ranking:
    """Ranks the pixels of all maps together, with the overlap of the masks' regions.

    Beside the arguments it needs one copy of the maps and one byte per pixel.

    Args:
      maps: [n, h, w], higher is more anomalous.
      masks: [n, h, w], 0 normal, anything else anomalous.
      roi: [h, w], only where it is not 0 a pixel counts; None: everywhere.
      known: [n], whether an image's mask is known: others do not count; None: of all.

    Raises:
      ValueError: shapes differ, or a value is NaN.
    """
    if known is not None:
        maps, masks = (disk.rows(x, np.flatnonzero(known)) for x in (maps, masks))
    anomalous = masks != 0
    if roi is None:
        return _rank(maps, anomalous, _region_weights(anomalous))
    inside = roi != 0
    weights = _region_weights(anomalous & inside)
    return _rank(maps[:, inside], anomalous[:, inside], weights)


def auroc(ranking: Ranking) -> float | None:
    """Area under the ROC curve by the trapezoidal rule, in [0, 1]; None for one class only."""
    if not ranking.defined:
        return None
    # In whole numbers, hence exact.
    twice = np.sum(np.diff(ranking.fp) * (ranking.tp[1:] + ranking.tp[:-1]))
    return float(twice) / 2 / (ranking.positives * ranking.negatives)


def average_precision(ranking: Ranking) -> float | None:
    """Sum of precision times recall step, in [0, 1]; None for one class only."""
    if not ranking.defined:
        return None
    tp, fp = ranking.tp[1:], ranking.fp[1:]
    return float(np.sum(np.diff(ranking.tp) * (tp / (tp + fp))) / ranking.positives)


def f1_max(ranking: Ranking) -> tuple[float, float] | None:
    """The highest F1, in [0, 1], and the highest threshold that reaches it; None for one class."""
    if not ranking.defined:
        return None
    f1 = 2 * ranking.tp / (ranking.tp + ranking.fp + ranking.positives)
    best = int(np.argmax(f1))
    return float(f1[best]), float(ranking.threshold[best])


def pro(ranking: Ranking, fpr_limit: float = PRO_FPR_LIMIT) -> float | None:
    """Area under the PRO curve up to `fpr_limit`, divided by it, in [0, 1].

    None for one class only, and for a ranking without regions.
    """
    curve = pro_curve(ranking)
    if curve is None:
        return None
    fpr, overlap = curve
    inside = int(np.searchsorted(fpr, fpr_limit, side="right"))
    area = np.trapezoid(overlap[:inside], fpr[:inside])
    if inside < len(fpr):
        # The last stretch ends between two thresholds.
        width = fpr_limit - fpr[inside - 1]
        slope = (overlap[inside] - overlap[inside - 1]) / (fpr[inside] - fpr[inside - 1])
        area += width * (overlap[inside - 1] + slope * width / 2)
    return float(area / fpr_limit)


def roc_curve(ranking: Ranking, points: int | None = None) -> Points | None:
    """False and true positive rates, from (0, 0) to (1, 1); None for one class only.

    Args:
      ranking: of images or of pixels.
      points: at most so many of the curve's own points, spread evenly along it; None for all.
    """
    if not ranking.defined:
        return None
    return _thin(ranking.fp / ranking.negatives, ranking.tp / ranking.positives, points)


def precision_recall_curve(ranking: Ranking, points: int | None = None) -> Points | None:
    """Recall and precision, by rising recall; None for one class only. `points` as in `roc_curve`.

    It has no made-up point at recall 0: the first one is the strictest threshold that calls
    anything anomalous.
    """
    if not ranking.defined:
        return None
    tp, fp = ranking.tp[1:], ranking.fp[1:]
    return _thin(tp / ranking.positives, tp / (tp + fp), points)


def pro_curve(ranking: Ranking, points: int | None = None) -> Points | None:
    """False positive rate and mean region overlap, from (0, 0) to (1, 1).

    None for one class only, and for a ranking without regions. `points` as in `roc_curve`.
    """
    if not ranking.defined or ranking.overlap is None:
        return None
    return _thin(ranking.fp / ranking.negatives, ranking.overlap, points)


def judgeable(labels: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Of which images the pixels can be judged: of normal ones, and where a mask marks some.

    A defect without a mask, or with one of which nothing is left, marks none.

    Args:
      labels: 0 for normal, else anomalous, [n].
      masks: 0 for a normal pixel, else anomalous, [n, ...].

    Returns:
      bool [n].
    """
    return (np.asarray(labels) == 0) | np.array([mask.any() for mask in masks], bool)


def evaluate_rankings(images: Ranking, pixels: Ranking) -> dict[str, float | None]:
    """All figures of one category.

    Returns:
      image_auroc, image_ap, image_f1_max, pixel_auroc, pixel_ap, pixel_f1_max, pro; in [0, 1], or
      None where one class alone leaves the figure undefined.
    """
    result = {}
    for level, ranking in (("image", images), ("pixel", pixels)):
        best = f1_max(ranking)
        result[f"{level}_auroc"] = auroc(ranking)
        result[f"{level}_ap"] = average_precision(ranking)
        result[f"{level}_f1_max"] = None if best is None else best[0]
    return result | {"pro": pro(pixels)}


def _rank(scores: np.ndarray, anomalous: np.ndarray, weights: np.ndarray | None) -> Ranking:
    """Counts by threshold; `weights` of the anomalous items (in C order) add up to the overlap."""
    if scores.shape != anomalous.shape:
        raise ValueError(f"scores are {scores.shape}, their ground truth {anomalous.shape}")
    if np.isnan(scores).any():
        raise ValueError("a score is NaN")
    positive, negative = scores[anomalous], scores[~anomalous]
    negative.sort()
    order = np.argsort(positive)[::-1]
    positive = positive[order]
    # The last item of each run of equal scores.
    last = np.flatnonzero(np.append(positive[1:] != positive[:-1], True)[: len(positive)])
    value = positive[last]

    # For each distinct anomalous score, the counts just above it and the counts with it; then the
    # laxest threshold, which also calls anomalous the normal items below all anomalous ones.
    tp_with = last + 1
    tp_above = np.concatenate([[0], tp_with])[:-1]
    fp_with = len(negative) - np.searchsorted(negative, value, side="left")
    fp_above = len(negative) - np.searchsorted(negative, value, side="right")
    lowest = float(scores.min(initial=np.inf))
    threshold = _between(np.nextafter(value, value.dtype.type(np.inf)), value, np.inf, lowest)
    tp = _between(tp_above, tp_with, 0, len(positive))
    fp = _between(fp_above, fp_with, 0, len(negative))
    new = np.append(True, (np.diff(tp) > 0) | (np.diff(fp) > 0))
    overlap = None
    if weights is not None and len(weights):
        # Rounding must not lift the sum of the weights above 1.
        with_value = np.minimum(np.cumsum(weights[order])[last], 1.0)
        above = np.concatenate([[0.0], with_value])[:-1]
        overlap = _between(above, with_value, 0.0, 1.0)[new]
    return Ranking(threshold[new], tp[new], fp[new], overlap, len(positive), len(negative))


def _between(
    above: np.ndarray, at: np.ndarray, first: float | int, last: float | int
) -> np.ndarray:
    """first, above[0], at[0], above[1], at[1], ..., last."""
    return np.concatenate([[first], np.stack([above, at], axis=1).ravel(), [last]])


def _region_weights(anomalous: np.ndarray) -> np.ndarray:
    """For each anomalous pixel of [n, h, w], in C order: 1 / (regions * its region's area).

    Summed over the pixels above a threshold this is the mean covered share of the regions.
    """
    weights, regions = [np.zeros(0)], 0
    for mask in anomalous:
        if mask.any():
            label, count = ndimage.label(mask, structure=np.ones((3, 3)))
            label = label[mask]
            weights.append(1 / np.bincount(label)[label])
            regions += count
    return np.concatenate(weights) / max(regions, 1)


def _thin(x: np.ndarray, y: np.ndarray, points: int | None) -> Points:
    """At most `points` of the curve's points, evenly along its length; both ends stay."""
    if points is None or len(x) <= points:
        return x, y
    length = np.append(0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    chosen = np.searchsorted(length, np.linspace(0.0, length[-1], points))
    chosen[-1] = len(x) - 1
    chosen = np.unique(chosen)
    return x[chosen], y[chosen]
