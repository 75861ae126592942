"""From scores to verdicts."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from prn_jax import thresholds
from prn_jax.errors import UserError


def refuse():
    raise AssertionError("images that were trained on are asked for")


def made(normal, anomalous, size=(4, 4), seed=0):
    """Scores, labels, maps and masks of random images, the defect's pixels higher."""
    rng = np.random.default_rng(seed)
    count = normal + anomalous
    labels = np.repeat([0, 1], [normal, anomalous])
    scores = (rng.random(count) + 0.3 * labels).astype(np.float32) / 2
    masks = (rng.random((count, *size)) < 0.3) & (labels[:, None, None] == 1)
    masks[labels == 1, 0, 0] = True
    maps = (rng.random((count, *size)) + 0.3 * masks).astype(np.float32) / 2
    return scores, labels, maps, masks.astype(np.uint8)


def test_the_threshold_lies_in_the_middle_of_the_gap():
    scores = np.array([0.1, 0.2, 0.9, 0.95], np.float32)
    labels = np.array([0, 0, 1, 1])
    maps = np.array([[[0.1, 0.2]], [[0.1, 0.3]], [[0.2, 0.7]], [[0.8, 0.1]]], np.float32)
    masks = (maps > 0.5).astype(np.uint8)
    found = thresholds.choose(scores, labels, maps, masks, refuse)
    assert found["image"] == pytest.approx(0.55)
    assert found["pixel"] == pytest.approx(0.5)
    # Even of two neighbouring numbers, the normal one stays below.
    scores[1] = np.nextafter(np.float32(0.9), np.float32(0))
    found = thresholds.choose(scores, labels, maps, masks, refuse)
    assert (scores >= found["image"]).tolist() == [False, False, True, True]


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_has_a_higher_f1(seed):
    scores, labels, maps, masks = made(20, 15, seed=seed)
    found = thresholds.choose(scores, labels, maps, masks, refuse)
    for values, truth, value in (
        (scores, labels, found["image"]),
        (maps.ravel(), masks.ravel(), found["pixel"]),
    ):
        # zero_division only where nothing is called anomalous.
        best = max(f1_score(truth, values >= x) for x in values)
        assert f1_score(truth, values >= value) == pytest.approx(best)
        # Rounding flips nothing: no score is as near as half of the gap around it.
        assert np.abs(values - value).min() > 0


def test_images_and_pixels_are_chosen_apart():
    scores, labels, maps, masks = made(20, 15)
    expected = thresholds.choose(scores, labels, maps, masks, refuse)
    assert expected["basis"]["image"]["images"] == 35
    # Without masks images keep their threshold; pixels have the normals'.
    found = thresholds.choose(scores, labels, maps, np.zeros_like(masks), refuse)
    assert found["image"] == expected["image"]
    assert found["pixel"] > maps[labels == 0].max()
    assert found["pixel"] == pytest.approx(maps[labels == 0].max(), rel=1e-6)
    assert found["basis"]["pixel"]["source"] == "above all 20 normal test images"
    assert "1 of 21" in found["basis"]["pixel"]["promise"]
    # One image without its mask changes no other's pixels.
    without = np.concatenate([masks[:34], np.zeros_like(masks[:1])])
    found = thresholds.choose(scores, labels, maps, without, refuse)
    alone = thresholds.choose(scores[:34], labels[:34], maps[:34], masks[:34], refuse)
    assert found["pixel"] == alone["pixel"]
    assert found["basis"]["pixel"]["images"] == 34


def test_images_that_were_trained_on_are_never_used_unsaid(caplog):
    scores, labels, maps, masks = made(0, 15)
    trained = np.full((3, 4, 4), 0.25, np.float32), np.array([0.1, 0.3, 0.2], np.float32)
    found = thresholds.choose(scores, labels, maps, masks, lambda: trained)
    assert found["image"] == pytest.approx(0.3)
    assert found["image"] > trained[1].max()
    assert "trained on" in found["basis"]["image"]["source"]
    # Defects alone have normal pixels.
    assert "F1-max on 15" in found["basis"]["pixel"]["source"]
    assert caplog.text.count("the image threshold, 0.3000") == 1
    assert "pixel" not in caplog.text
    nothing = [x[:0] for x in (scores, labels, maps, masks)]
    found = thresholds.choose(*nothing, lambda: trained)
    assert found["pixel"] == pytest.approx(0.25)
    assert "the pixel threshold" in caplog.text


def test_above_normals_keeps_its_promise():
    """Of a thousand draws, as many are above as is promised: one of n + 1."""
    rng = np.random.default_rng(0)
    alarms = []
    for _ in range(1000):
        scores = rng.beta(2, 9, 11).astype(np.float32)
        maps = np.zeros((10, 1, 1), np.float32)
        chosen = thresholds.choose(
            scores[:10], np.zeros(10, int), maps, np.zeros((10, 1, 1), int), refuse
        )
        alarms.append(scores[10] >= chosen["image"])
    assert np.mean(alarms) == pytest.approx(1 / 11, abs=4 * np.sqrt(1 / 11 * 10 / 11 / 1000))


# --- a promised rate of false alarms --------------------------------------------------------------


def calibrated(scores):
    """Thresholds of a run whose held-out normal images have these scores."""
    scores = np.asarray(scores, np.float32)
    none = np.zeros(0, np.float32)
    held = np.zeros((len(scores), 1, 1), np.float32), scores
    empty = np.zeros((0, 1, 1))
    trained = np.ones((1, 1, 1), np.float32), np.ones(1, np.float32)
    return thresholds.choose(none, none, empty, empty, lambda: trained, held=held)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("count", "rate"), [(21, 0.05), (99, 0.01), (40, 0.1), (19, 0.05)])
def test_false_alarms_are_as_rare_as_promised(count, rate, ties):
    """A thousand runs, each with its own held-out images and its own two hundred new ones."""
    rng = np.random.default_rng(count)
    shares, inside = [], []
    for _ in range(1000):
        drawn = rng.gamma(2.0, 0.1, count + 200)
        scores = np.round(drawn, 1 if ties else 9).astype(np.float32)
        found = thresholds.for_false_alarms(calibrated(scores[:count]), rate)
        shares.append(np.mean(scores[count:] >= found["value"]))
        rate_of_these = stats.gamma.sf(found["value"], 2.0, scale=0.1)
        inside.append(found["range"][0] <= rate_of_these <= found["range"][1])
    # Counted here by the definition, in whole numbers: floor((n + 1) rate) of the n + 1 may alarm.
    promised = round((count + 1) * rate * 1e6) // 10**6 / (count + 1)
    error = 4 * np.std(shares) / np.sqrt(1000)
    assert np.mean(shares) <= promised + error
    if not ties:  # then it is no more cautious than it must be
        assert np.mean(shares) == pytest.approx(promised, abs=error)
        assert np.mean(inside) == pytest.approx(0.9, abs=0.04)


def test_the_conformal_threshold_is_the_kth_smallest_score():
    rng = np.random.default_rng(0)
    for count in (1, 2, 19, 20, 99, 100, 199):
        scores = rng.random(count).astype(np.float32)
        for rate in (0.005, 0.01, 0.05, 0.07, 0.29, 0.5):
            # In hundredths of a per cent, where no rounding lifts the rank.
            rank = -((count + 1) * (10_000 - round(10_000 * rate)) // -10_000)
            if rank > count:
                least = next(n for n in range(999) if (n + 1) * round(10_000 * rate) >= 10_000)
                with pytest.raises(UserError, match=f"takes {least} normal .*there are {count};"):
                    thresholds.for_false_alarms(calibrated(scores), rate)
                continue
            value = thresholds.for_false_alarms(calibrated(scores), rate)["value"]
            kth = np.sort(scores)[rank - 1]
            assert kth < np.float32(value) <= np.nextafter(kth, np.float32(2))


def test_too_few_images_are_said_with_how_many_it_takes(caplog):
    caplog.set_level("INFO", logger="absl")
    none, one = np.zeros(0, np.float32), np.ones(1)
    labels = np.array([0, 1])
    rows = thresholds.at_rates(calibrated([0.1] * 20), (0.001, 0.01, 0.05), labels, labels)
    assert [row.get("needed") for row in rows] == [999, 99, None]
    assert rows[2]["recall"] == 1.0
    assert rows[2]["false_alarms"] == 0.0
    # Without anomalous test images the normal ones choose, and are no judges of that.
    (row,) = thresholds.at_rates(calibrated([0.1] * 20), (0.05,), np.ones(3), np.zeros(3))
    assert row["recall"] is row["false_alarms"] is None
    thresholds.log_rates(rows)
    assert "20 normal images promise at best 4.76 % false alarms" in caplog.text
    assert "0.1 % takes 999, 1 % takes 99" in caplog.text
    # Every score alike: nothing that is no higher is an alarm.
    assert rows[2]["value"] > np.float32(0.1)
    with pytest.raises(UserError, match=r"takes 99 normal .* there are 1; 1 promise .* 50 %"):
        thresholds.for_false_alarms(calibrated([0.5]), 0.01)
    assert thresholds.for_false_alarms(calibrated([0.5]), 0.5)["value"] > 0.5
    nothing = calibrated(none)
    assert nothing["normal"] is None
    assert thresholds.at_rates(nothing, (0.5,), none, none) == []
    for without in (nothing, {}):
        with pytest.raises(UserError, match=r"takes 1 normal .*, and there are 0; train with"):
            thresholds.for_false_alarms(without, 0.5)
    with pytest.raises(UserError, match="a share of false alarms of 5: give one between"):
        thresholds.for_false_alarms(calibrated(one), 5)


def test_test_images_promise_only_where_they_decide_nothing_else():
    scores, labels, maps, masks = made(20, 15)
    held = maps[:5] + 1, np.linspace(0.1, 0.2, 5, dtype=np.float32)
    both = thresholds.choose(scores, labels, maps, masks, refuse, held=held)
    alone = thresholds.choose(scores, labels, maps, masks, refuse)
    assert both["image"] == alone["image"]
    assert both["pixel"] == alone["pixel"]
    assert both["normal"] == {
        "source": "5 held-out images, all normal", "values": held[1].tolist()
    }  # fmt: skip
    assert alone["normal"] is None
    # Nothing else is chosen by distances: those of normal test images count.
    assert alone["distance"] is thresholds.select_distance(alone, 0.1) is None
    whole = np.arange(1, 36, dtype=np.float32), np.full(5, 30, np.float32)
    found = thresholds.choose(scores, labels, maps, masks, refuse, held=held, distances=whole)
    assert found["distance"] == pytest.approx(30)
    assert found["distance"] > 30
    assert thresholds.select_distance(found, 0.01)["value"] == found["distance"]
    # One in five of 26: the 21st smallest of 1 to 20 and five times 30.
    assert thresholds.select_distance(found, 0.2)["value"] == pytest.approx(30)
    assert thresholds.select_distance(found, 0.25)["value"] == pytest.approx(20)
    normal = labels == 0
    given = scores[normal], labels[normal], maps[normal], masks[normal]
    found = thresholds.choose(*given, refuse, held=held)
    assert found["normal"]["values"] == sorted([*held[1].tolist(), *scores[normal].tolist()])
    assert found["basis"]["image"]["source"] == (
        "above all 5 held-out and 20 test images, all normal"
    )
    assert found["pixel"] > held[0].max()


def test_the_least_cost_is_found():
    scores, labels, maps, masks = made(30, 25, seed=3)
    chosen = thresholds.choose(scores, labels, maps, masks, refuse)
    for miss, alarm in ((1, 1), (100, 1), (1, 100), (1e6, 1), (1, 1e6)):

        def cost(at, miss=miss, alarm=alarm):
            called = scores >= at
            return miss * (~called & (labels == 1)).sum() + alarm * (called & (labels == 0)).sum()

        found = thresholds.for_costs(chosen, miss, alarm)
        assert cost(found["value"]) == min(cost(at) for at in [*scores, 2.0])
        assert np.abs(scores - found["value"]).min() > 0
        assert "on 55 test images" in found["source"]
    with pytest.raises(UserError, match="without test images of both kinds"):
        thresholds.for_costs({}, 1, 1)
    with pytest.raises(UserError, match="greater than 0"):
        thresholds.for_costs(chosen, 0, 1)


def test_one_way_to_ask_for_a_threshold():
    scores, labels, maps, masks = made(30, 25)
    chosen = thresholds.choose(scores, labels, maps, masks, refuse)
    assert thresholds.select(None) is None
    assert thresholds.select(chosen)["value"] == chosen["image"]
    assert thresholds.select(None, threshold=0.0)["value"] == 0.0
    with pytest.raises(UserError, match="both --cost_of_miss and"):
        thresholds.select(chosen, cost_of_miss=1.0)
    with pytest.raises(UserError, match="give one of --threshold"):
        thresholds.select(chosen, threshold=0.5, max_false_alarms=0.1)
