"""The flags that decide on verdicts, as far as `tables.Asked`."""

import types

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from prn_jax import thresholds
from prn_jax.errors import UserError
from prn_jax.programs import verdicts

RNG = np.random.default_rng(0)
HELD, DISTANCES = RNG.permutation(np.linspace(0.1, 0.5, 99)), RNG.uniform(1, 2, 99)
GOOD, BAD = np.linspace(0.2, 0.7, 20), np.linspace(0.5, 0.9, 20)


@pytest.fixture
def detector():
    """One with thresholds of 99 held-out images and of 40 test images whose scores overlap."""
    scores = np.float32([*GOOD, *BAD])
    labels = np.repeat([0, 1], 20)
    maps = np.repeat(scores[:, None], 4, axis=1)
    masks = np.repeat(labels[:, None], 4, axis=1)
    held = np.float32(HELD)
    chosen = thresholds.choose(
        scores, labels, maps, masks, trained_on=lambda: None,
        held=(np.repeat(held[:, None], 4, axis=1), held),
        distances=(np.float32(2 * scores), np.float32(DISTANCES)),
    )  # fmt: skip
    return types.SimpleNamespace(thresholds=chosen)


@pytest.fixture(autouse=True)
def parsed():
    flags.FLAGS.mark_as_parsed()
    yield
    flags.FLAGS.unparse_flags()


def asked(detector, **given):
    with flagsaver.flagsaver(**given):
        return verdicts.asked(detector)


def test_without_flags_the_checkpoint_s_own_count(detector):
    found, own = asked(detector), detector.thresholds
    assert (found.threshold, found.pixel_threshold) == (own["image"], own["pixel"])
    assert (found.distance, found.min_area) == (own["distance"], 1)


def test_what_is_given_counts_as_it_is(detector):
    found = asked(detector, threshold=0.3, pixel_threshold=0.7, min_area=9)
    assert (found.threshold, found.pixel_threshold, found.min_area) == (0.3, 0.7, 9)
    with pytest.raises(UserError, match="--pixel_threshold=2.0: give a value from 0 to 1"):
        asked(detector, pixel_threshold=2.0)


def test_a_rate_of_false_alarms_sets_score_and_distance(detector):
    found = asked(detector, max_false_alarms=0.05)
    # Of 99 and one new one 5 may lie above: the fifth highest may not.
    assert np.sum(np.float32(HELD) >= found.threshold) == 4
    assert found.threshold == pytest.approx(np.sort(HELD)[94], abs=1e-6)
    others = np.concatenate([DISTANCES, 2 * GOOD])  # normal test images tell distances too
    assert np.mean(others >= found.distance) <= 0.05
    assert found.distance < detector.thresholds["distance"]


def test_what_costs_more_happens_less(detector):
    misses, alarms = [], []
    for miss, alarm in ((100.0, 1.0), (1.0, 100.0)):
        found = asked(detector, cost_of_miss=miss, cost_of_false_alarm=alarm).threshold
        misses.append(np.sum(np.float32(BAD) < found))
        alarms.append(np.sum(np.float32(GOOD) >= found))
    assert misses[0] == alarms[1] == 0
    assert misses[1] > 0
    assert alarms[0] > 0
