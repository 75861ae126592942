"""Scores -> verdicts: from which score an image, and from which value a pixel, is anomalous.

Both are chosen apart, each from the best images there are for it, and each says from which:

1. Images of both classes (pixels: pixels of both): where F1 is highest, in the middle between the
   weakest score that is called anomalous and the next one below, so that rounding flips neither.
2. Normal images that were not trained on: the least threshold above all n of them. A further
   normal image scores higher than all n with a probability of at most 1 / (n + 1), whatever the
   distribution, for each of the n + 1 is as likely to be the highest (split conformal prediction:
   Vovk et al., Algorithmic Learning in a Random World, 2005).
3. Only images that were trained on: the least threshold above all of those given. It promises
   nothing, for new images score higher than those; a warning says so.

Beside them stay the scores of the normal images that neither were trained on nor decide otherwise:
`for_false_alarms` reads off them the threshold that keeps any given rate, by the same argument. The
test split's scores stay too: `for_costs` weighs misses against false alarms on them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from scipy import stats

from prn_jax import disk, metrics
from prn_jax.errors import UserError

Thresholds = dict[str, Any]
Basis = dict[str, Any]


def choose(
    scores: np.ndarray,
    labels: np.ndarray,
    maps: np.ndarray,
    masks: np.ndarray,
    trained_on: Callable[[], tuple[np.ndarray, np.ndarray]],
    held: tuple[np.ndarray, np.ndarray] | None = None,
    distances: tuple[np.ndarray, np.ndarray] | None = None,
) -> Thresholds:
    """Chooses the thresholds of one category.

    Args:
      scores: of the test images, float32 [n].
      labels: 1 for anomalous, 0 for normal, [n].
      maps: float32 [n, ...].
      masks: 0 for a normal pixel, else anomalous, of the same shape. One of an anomalous image that
        marks nothing is unknown.
      trained_on: returns the maps and scores of normal training images; called only where nothing
        else is left.
      held: maps and scores of the normal images that were held out; default: none.
      distances: of the whole test images and of those held out, float32 [n] and [m]; default: none.

    Returns:
      `image`, `pixel` and `distance`, the thresholds, and for each in `basis`: `source` (which
      images, as text), `images` (how many) and `promise` (text). `distance` is above all normal
      images that were not trained on, None (without basis) where there are none. `normal` and
      `whole`: `source` and ascending `values` of the normal images for `for_false_alarms`, scores
      and distances, None without any. `test`: `scores` and `anomalous` of the test images.
    """
    normal = np.asarray(labels) == 0
    held_maps, held_scores = held or (maps[:0], scores[:0])
    usable = metrics.judgeable(labels, masks)
    image = pixel = None
    if len(scores) and 0 < normal.sum() < len(scores):
        image = _by_f1(scores, ~normal, len(scores))
    if masks.any() and not masks[usable].all():
        some_maps, some_masks = (disk.rows(x, np.flatnonzero(usable)) for x in (maps, masks))
        pixel = _by_f1(some_maps, some_masks != 0, int(usable.sum()))
    # Where test images chose a threshold above, their false alarms are what it is judged by.
    spare = normal & (image is None)
    known_normal = np.concatenate([held_scores, scores[spare]])
    source = _normals(len(held_scores), int(spare.sum()))
    if len(known_normal):
        image = image or _above(known_normal, len(known_normal), source)
    if pixel is None and len(held_scores) + normal.sum():
        values = np.concatenate([held_maps.ravel(), maps[normal].ravel()])
        count = len(held_scores) + int(normal.sum())
        pixel = _above(values, count, _normals(len(held_scores), int(normal.sum())))
    if image is None or pixel is None:
        train_maps, train_scores = trained_on()
        image = image or _above_trained("image", train_scores, len(train_scores))
        pixel = pixel or _above_trained("pixel", train_maps, len(train_scores))
    basis = {"image": image, "pixel": pixel}
    whole = np.zeros(0, np.float32)
    if distances is not None:  # nothing else is chosen by them
        whole = np.concatenate([distances[1], distances[0][normal]])
    all_normal = _normals(len(held_scores), int(normal.sum()))
    if len(whole):
        basis["distance"] = _above(whole, len(whole), all_normal)
    return (
        {"distance": None}
        | {level: x.pop("value") for level, x in basis.items()}
        | {
            "basis": basis,
            "normal": _spared(source, known_normal),
            "whole": _spared(all_normal, whole),
            "test": {"scores": scores.tolist(), "anomalous": (~normal).tolist()},
        }
    )


def describe(basis: Basis) -> str:
    """What a threshold was chosen by and what it promises, as one line."""
    return f"{basis['source']}: {basis['promise']}"


def select(
    thresholds: Thresholds | None,
    *,
    threshold: float | None = None,
    max_false_alarms: float | None = None,
    cost_of_miss: float | None = None,
    cost_of_false_alarm: float | None = None,
) -> Basis | None:
    """The threshold of the images as a user asks for it, in one of three ways; else the default.

    Args:
      thresholds: from `choose`; None where a checkpoint has none.
      threshold: the score itself.
      max_false_alarms: see `for_false_alarms`.
      cost_of_miss: see `for_costs`, as `cost_of_false_alarm`.
      cost_of_false_alarm: both or neither.

    Returns:
      `value`, `source` and `promise`; None where nothing is asked for and there is none.

    Raises:
      UserError: it is asked for in two ways, or cannot be had.
    """
    costs = cost_of_miss, cost_of_false_alarm
    if (costs[0] is None) != (costs[1] is None):
        raise UserError("give both --cost_of_miss and --cost_of_false_alarm")
    if sum(x is not None for x in (threshold, max_false_alarms, costs[0])) > 1:
        raise UserError(
            "give one of --threshold, --max_false_alarms, and --cost_of_miss with "
            "--cost_of_false_alarm"
        )
    if threshold is not None:
        return {"value": threshold, "source": "as given", "promise": "nothing is promised"}
    if max_false_alarms is not None:
        return for_false_alarms(thresholds or {}, max_false_alarms)
    if costs[0] is not None:
        return for_costs(thresholds or {}, *costs)
    return thresholds and {"value": thresholds["image"], **_basis(thresholds, "image")}


def select_distance(thresholds: Thresholds | None, max_false_alarms: float | None) -> Basis | None:
    """The threshold of the whole images' distances: for a rate of false alarms, else the default.

    Returns:
      `value`, `source` and `promise`; None where no normal images were there to choose it by. Where
      they are too few for the rate it is the default.
    """
    known = (thresholds or {}).get("whole")
    if not known:
        return None
    if max_false_alarms is not None and len(known["values"]) >= needed(max_false_alarms):
        return for_false_alarms(thresholds, max_false_alarms, "whole")
    return {"value": thresholds["distance"], **_basis(thresholds, "distance")}


def _basis(thresholds: Thresholds, level: str) -> Basis:
    """What a threshold was chosen by; an earlier version did not say it."""
    unknown = {"source": "an earlier version's choice", "promise": "what it promises is not known"}
    return thresholds.get("basis", {}).get(level, unknown)


# --- a given rate of false alarms -----------------------------------------------------------------


def needed(rate: float) -> int:
    """Normal images that it takes to promise a rate of false alarms."""
    return math.ceil(1 / rate - 1e-9) - 1


def for_false_alarms(thresholds: Thresholds, rate: float, kind: str = "normal") -> Basis:
    """The least threshold that keeps a rate of false alarms, by split conformal prediction.

    Of n normal images and a new one, alike in distribution, each of the n + 1 is as likely to have
    the k-th highest score. So the new one scores above the ceil((n + 1)(1 - rate))-th smallest of
    the n with a probability of at most `rate`, over the draws of all of them. With the n given, the
    share of new ones above it is distributed as Beta(m, n + 1 - m), m = floor((n + 1) rate).

    Args:
      thresholds: from `choose`.
      rate: in (0, 1).
      kind: "normal" for scores, "whole" for distances.

    Returns:
      `value` (an image is anomalous from it on), `source`, `images`, `promise`, and `range`: the
      5th and 95th percentile of the rate that is to be expected with these very images.

    Raises:
      UserError: the rate is no share, or there are too few images for it.
    """
    if not 0 < rate < 1:
        raise UserError(f"a share of false alarms of {rate:g}: give one between 0 and 1, as 0.01")
    normal = thresholds.get(kind) or {"source": "none", "values": []}
    values = np.asarray(normal["values"], np.float32)
    count = len(values)
    above = math.floor((count + 1) * rate + 1e-9)
    if not above:
        least = f"; {count} promise at best {percent(1 / (count + 1))}" if count else ""
        raise UserError(
            f"at most {percent(rate)} false alarms: it takes {needed(rate)} normal images that "
            f"were not trained on, and there are {count}{least}; train with a higher data.holdout "
            "or on more images"
        )
    low, high = stats.beta.ppf([0.05, 0.95], above, count + 1 - above)
    return {
        "value": _just_above(np.sort(values)[count - above]),
        "source": normal["source"],
        "images": count,
        "range": [float(low), float(high)],
        "promise": (
            f"of new normal images like them on average at most {percent(rate)} are higher "
            f"({percent(low)} to {percent(high)}, 9 times of 10)"
        ),
    }


def at_rates(
    thresholds: Thresholds, rates: Sequence[float], scores: np.ndarray, labels: np.ndarray
) -> list[dict[str, Any]]:
    """What each rate of false alarms costs in recall, on test images.

    Args:
      thresholds: from `choose`.
      rates: each in (0, 1).
      scores: of the test images, [n].
      labels: 1 for anomalous, [n].

    Returns:
      For each rate `rate`, `images` and, where they suffice, what `for_false_alarms` returns with
      `recall` and `false_alarms` of the test images, in [0, 1] (None without such images, and
      where normal test images chose the threshold themselves); else `needed`. Empty where there
      are no normal images to choose by.
    """
    if not thresholds["normal"]:
        return []
    count, rows = len(thresholds["normal"]["values"]), []
    for rate in rates:
        if count < needed(rate):
            rows.append({"rate": rate, "images": count, "needed": needed(rate)})
            continue
        basis = for_false_alarms(thresholds, rate)
        alarm, anomalous = scores >= basis["value"], np.asarray(labels) != 0
        judged = anomalous, ~anomalous & anomalous.any()  # without any the normal ones chose
        shares = [float(alarm[x].mean()) if x.any() else None for x in judged]
        rows.append({"rate": rate, **basis, "recall": shares[0], "false_alarms": shares[1]})
    return rows


def log_rates(rows: Sequence[dict[str, Any]]) -> None:
    """Says what `at_rates` found: a line per rate, and one for those that have too few images."""
    for row in rows:
        if "value" in row:
            recall = "-" if row["recall"] is None else percent(row["recall"])
            logging.info(
                "at most %s false alarms: threshold %.4f, recall %s; %s",
                percent(row["rate"]), row["value"], recall, describe(row),
            )  # fmt: skip
    short = [f"{percent(row['rate'])} takes {row['needed']}" for row in rows if "needed" in row]
    if short:
        logging.info(
            "%d normal images promise at best %s false alarms: %s",
            rows[0]["images"], percent(1 / (rows[0]["images"] + 1)), ", ".join(short),
        )  # fmt: skip


# --- costs ----------------------------------------------------------------------------------------


def for_costs(thresholds: Thresholds, miss: float, false_alarm: float) -> Basis:
    """The threshold of the least cost on the test images, in the middle of its gap.

    Args:
      thresholds: from `choose`.
      miss: cost of an anomalous image that is called normal.
      false_alarm: cost of a normal image that is called anomalous.

    Returns:
      `value`, `source`, `images` and `promise`.

    Raises:
      UserError: a cost is not positive, or the test images are of one kind only.
    """
    if not (miss > 0 and false_alarm > 0 and math.isfinite(miss + false_alarm)):
        raise UserError("cost_of_miss and cost_of_false_alarm: give numbers greater than 0")
    test = thresholds.get("test") or {"scores": [], "anomalous": []}
    scores, anomalous = np.asarray(test["scores"], np.float32), np.asarray(test["anomalous"], bool)
    ranking = metrics.rank_images(scores, anomalous)
    if not ranking.defined:
        raise UserError(
            "no costs without test images of both kinds, normal and anomalous: give --threshold or "
            "--max_false_alarms"
        )
    costs = miss * (ranking.positives - ranking.tp) + false_alarm * ranking.fp
    value = _in_the_gap(scores, float(ranking.threshold[int(np.argmin(costs))]))
    called = scores >= value
    missed, wrong = int((anomalous & ~called).sum()), int((called & ~anomalous).sum())
    return {
        "value": value,
        "source": f"least cost on {len(scores)} test images",
        "images": len(scores),
        "promise": (
            f"{missed} of {ranking.positives} anomalous ones are missed, {wrong} of "
            f"{ranking.negatives} normal ones called anomalous; where anomalous ones are rarer, "
            "give a cost_of_miss that is lower in proportion"
        ),
    }


# --- how each is chosen ---------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share as percent, with as many digits as it needs."""
    return f"{100 * share:.3g} %"


def _by_f1(values: np.ndarray, anomalous: np.ndarray, count: int) -> Basis:
    """In the middle of the gap below the weakest value that F1-max calls anomalous."""
    _, least = metrics.f1_max(metrics.rank_images(values.ravel(), anomalous.ravel()))
    return {
        "value": _in_the_gap(values, least),
        "source": f"F1-max on {count} test images",
        "images": count,
        "promise": "the best on these images; others may differ",
    }


def _in_the_gap(values: np.ndarray, least: float) -> float:
    """In the middle between the least value that is at least `least` and the next one below."""
    kept = values.min(where=values >= least, initial=np.inf)
    below = values.max(where=values < least, initial=0.0)  # nothing scores less than 0
    if kept == np.inf:  # above all
        return _just_above(below)
    middle = values.dtype.type((float(below) + float(kept)) / 2)
    # Of two neighbouring numbers the upper one: the middle would be rounded to either.
    return float(middle if middle > below else kept)


def _just_above(value: np.floating) -> float:
    return float(np.nextafter(value, value.dtype.type(np.inf)))


def _normals(held: int, tested: int) -> str:
    """Which normal images, in words."""
    parts = [f"{held} held-out"] * (held > 0) + [f"{tested} test"] * (tested > 0)
    text = " and ".join(parts)
    return f"{tested} normal test images" if not held else f"{text} images, all normal"


def _spared(source: str, values: np.ndarray) -> dict[str, Any] | None:
    return {"source": source, "values": np.sort(values).tolist()} if len(values) else None


def _above(values: np.ndarray, count: int, source: str) -> Basis:
    return {
        "value": _just_above(values.max()),
        "source": f"above all {source}",
        "images": count,
        "promise": f"of normal images like them, on average at most 1 of {count + 1} is higher",
    }


def _above_trained(level: str, values: np.ndarray, count: int) -> Basis:
    basis = _above(values, count, f"{count} images that were trained on") | {
        "promise": "none, for new normal images score higher than these: expect false alarms",
    }
    logging.warning(
        "the %s threshold, %.4f, lies %s, as there are no others: new normal images score higher, "
        "so expect false alarms; put normal images that are not trained on into test/good",
        level, basis["value"], basis["source"],
    )  # fmt: skip
    return basis
