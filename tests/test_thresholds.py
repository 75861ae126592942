"""From scores to verdicts."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from prn_jax import thresholds


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
    # Without masks, and with black ones, images keep their threshold; pixels have the normals'.
    unknown = labels == 0
    for given, known in ((masks, unknown), (np.zeros_like(masks), None)):
        found = thresholds.choose(scores, labels, maps, given, refuse, known)
        assert found["image"] == expected["image"]
        assert found["pixel"] > maps[labels == 0].max()
        assert found["pixel"] == pytest.approx(maps[labels == 0].max(), rel=1e-6)
        assert found["basis"]["pixel"]["source"] == "above all 20 normal test images"
        assert "1 of 21" in found["basis"]["pixel"]["promise"]
    # One image without its mask changes no other's pixels.
    known = np.arange(35) != 34
    found = thresholds.choose(scores, labels, maps, masks, refuse, known)
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
