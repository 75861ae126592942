"""Metrics against scikit-learn and against plain, slow computations."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from prn_jax import metrics


def plain_pro(maps, masks, limit=0.3):
    """PRO by its definition: every threshold, every region, one comparison each."""
    regions = []
    for i, mask in enumerate(masks):
        label, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(i, label == k) for k in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        called = maps >= threshold
        fpr = called[masks == 0].mean()
        points.append((fpr, np.mean([called[i][region].mean() for i, region in regions])))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 >= limit or x1 == x0:
            continue
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def plain_f1_max(scores, labels):
    return max(sklearn_metrics.f1_score(labels, scores >= t) for t in np.unique(scores))


def make_maps(seed, levels=None, strength=1.0, n=6, h=20, w=24):
    """Random maps and blobby masks; `levels` rounds the maps, so that ties abound."""
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.normal(size=(n, h, w)), (0, 2, 2)) > 0.15
    masks[0] = False
    maps = rng.normal(size=(n, h, w)) + strength * masks
    maps = 1 / (1 + np.exp(-maps))
    if levels is not None:
        maps = np.round(maps * levels) / levels
    return maps.astype(np.float32), masks.astype(np.uint8)


@pytest.mark.parametrize("levels", [None, 3, 20])
@pytest.mark.parametrize("seed", range(4))
def test_pixel_figures_equal_the_oracles(seed, levels):
    maps, masks = make_maps(seed, levels, strength=seed * 0.7)
    ranking = metrics.rank_pixels(maps, masks)
    y, s = masks.ravel(), maps.ravel()
    assert metrics.auroc(ranking) == pytest.approx(sklearn_metrics.roc_auc_score(y, s), abs=1e-9)
    expected = sklearn_metrics.average_precision_score(y, s)
    assert metrics.average_precision(ranking) == pytest.approx(expected, abs=1e-9)
    assert metrics.pro(ranking) == pytest.approx(plain_pro(maps, masks), abs=1e-6)
    assert metrics.pro(ranking, 1.0) == pytest.approx(plain_pro(maps, masks, 1.0), abs=1e-6)


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("seed", range(10))
def test_image_figures_equal_the_oracles(seed, levels):
    rng = np.random.default_rng(seed)
    labels = (np.arange(37) % 3 == 0).astype(np.int64)
    scores = rng.normal(size=37) + labels * rng.uniform(-1, 3)
    if levels is not None:
        scores = np.round(scores * levels) / levels
    ranking = metrics.rank_images(scores, labels)
    expected = sklearn_metrics.roc_auc_score(labels, scores)
    assert metrics.auroc(ranking) == pytest.approx(expected, abs=1e-9)
    expected = sklearn_metrics.average_precision_score(labels, scores)
    assert metrics.average_precision(ranking) == pytest.approx(expected, abs=1e-9)
    best, threshold = metrics.f1_max(ranking)
    assert best == pytest.approx(plain_f1_max(scores, labels), abs=1e-12)
    at_threshold = sklearn_metrics.f1_score(labels, scores >= threshold)
    assert best == pytest.approx(at_threshold, abs=1e-12)


@pytest.mark.parametrize("levels", [None, 5])
def test_every_point_is_what_its_threshold_gives(levels):
    maps, masks = make_maps(1, levels, n=2, h=9, w=7)
    ranking = metrics.rank_pixels(maps, masks)
    for threshold, tp, fp in zip(ranking.threshold, ranking.tp, ranking.fp, strict=True):
        called = maps >= threshold
        assert tp == called[masks == 1].sum()
        assert fp == called[masks == 0].sum()
    assert np.all(np.diff(ranking.threshold) <= 0)
    assert ranking.tp[-1] == masks.sum()
    assert ranking.fp[-1] == (masks == 0).sum()


def test_the_left_out_points_lie_on_the_curves():
    maps, masks = make_maps(2)
    ranking = metrics.rank_pixels(maps, masks)
    fpr, tpr = metrics.roc_curve(ranking)
    full_fpr, full_tpr, _ = sklearn_metrics.roc_curve(
        masks.ravel(), maps.ravel(), drop_intermediate=False
    )
    assert len(fpr) < len(full_fpr)
    ours = set(zip(fpr.tolist(), tpr.tolist(), strict=True))
    assert ours <= set(zip(full_fpr.tolist(), full_tpr.tolist(), strict=True))
    recall, precision = metrics.precision_recall_curve(ranking)
    assert np.all(np.diff(recall) >= 0)
    assert np.sum(np.diff(recall, prepend=0) * precision) == pytest.approx(
        metrics.average_precision(ranking)
    )
    _, overlap = metrics.pro_curve(ranking)
    assert np.all(np.diff(overlap) >= 0)
    assert (overlap[0], overlap[-1]) == (0, 1)


def test_a_thinned_curve_keeps_its_ends_and_its_shape():
    ranking = metrics.rank_pixels(*make_maps(3, n=12, h=64, w=64))
    curves = (metrics.roc_curve, metrics.precision_recall_curve, metrics.pro_curve)
    for curve in curves:
        x, y = curve(ranking)
        thin_x, thin_y = curve(ranking, points=200)
        assert len(thin_x) <= 200 < len(x)
        assert (thin_x[0], thin_y[0]) == (x[0], y[0])
        assert (thin_x[-1], thin_y[-1]) == (x[-1], y[-1])
        assert np.trapezoid(thin_y, thin_x) == pytest.approx(np.trapezoid(y, x), abs=0.01)


def test_pro_weighs_regions_and_not_pixels():
    # A large region missed, a small one found (diagonal neighbours: one region), no false alarm.
    masks = np.zeros((2, 16, 16), np.uint8)
    masks[0, :8, :8] = 1
    masks[1, 3, 3] = masks[1, 4, 4] = 1
    maps = np.zeros((2, 16, 16), np.float32)
    maps[1, 3, 3] = maps[1, 4, 4] = 1
    # The curve jumps to 1/2 and rises straight to (1, 1).
    assert metrics.pro(metrics.rank_pixels(maps, masks)) == pytest.approx((0.5 + 0.65) / 2)
    # Four-connected, the pair would be two regions and the curve would start at 2/3.
    assert metrics.pro_curve(metrics.rank_pixels(maps, masks))[1][1] == 0.5


def test_constant_maps_are_worth_chance():
    _, masks = make_maps(0)
    flat = np.full(masks.shape, 0.3, np.float32)
    ranking = metrics.rank_pixels(flat, masks)
    assert metrics.auroc(ranking) == 0.5
    assert metrics.average_precision(ranking) == pytest.approx(masks.mean())
    assert metrics.pro(ranking) == pytest.approx(0.15)


def evaluate(maps, masks, scores, labels):
    """All figures of a category's test split."""
    return metrics.evaluate_rankings(
        metrics.rank_images(scores, labels), metrics.rank_pixels(maps, masks)
    )


def test_perfect_maps_score_one():
    _, masks = make_maps(0)
    labels = masks.max(axis=(1, 2)).astype(np.int32)
    result = evaluate(masks.astype(np.float32), masks, labels.astype(np.float32), labels)
    assert set(result) == {
        "image_auroc",
        "image_ap",
        "image_f1_max",
        "pixel_auroc",
        "pixel_ap",
        "pixel_f1_max",
        "pro",
    }
    assert {type(value) for value in result.values()} == {float}
    assert list(result.values()) == pytest.approx([1] * 7, abs=1e-12)


def test_order_and_monotone_rescaling_change_nothing():
    maps, masks = make_maps(5, levels=50)
    labels = masks.max(axis=(1, 2)).astype(np.int32)
    scores = maps.max(axis=(1, 2))
    before = evaluate(maps, masks, scores, labels)
    turn = np.random.default_rng(0).permutation(len(maps))
    after = evaluate(
        np.exp(3 * maps[turn]), masks[turn] * np.uint8(255), np.exp(scores[turn]), labels[turn]
    )
    assert after == pytest.approx(before, abs=1e-12)


@pytest.mark.parametrize("value", [0, 1])
def test_one_class_only_is_undefined(value):
    maps, _ = make_maps(0)
    masks = np.full(maps.shape, value, np.uint8)
    labels = np.full(len(maps), value, np.int32)
    result = evaluate(maps, masks, maps.max(axis=(1, 2)), labels)
    assert set(result.values()) == {None}
    ranking = metrics.rank_pixels(maps, masks)
    assert metrics.roc_curve(ranking) is None
    assert metrics.precision_recall_curve(ranking) is None
    assert metrics.pro_curve(ranking) is None


def test_nothing_at_all_is_undefined():
    empty = np.zeros((0, 4, 4), np.float32)
    result = evaluate(empty, empty.astype(np.uint8), np.zeros(0, np.float32), np.zeros(0, np.int32))
    assert set(result.values()) == {None}


def test_nan_is_refused():
    maps, masks = make_maps(0)
    labels = masks.max(axis=(1, 2)).astype(np.int32)
    scores = maps.max(axis=(1, 2))
    maps[2, 3, 4] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        evaluate(maps, masks, scores, labels)
    maps[2, 3, 4] = 0
    scores[1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        evaluate(maps, masks, scores, labels)


def test_the_input_is_left_alone():
    maps, masks = make_maps(0)
    copies = maps.copy(), masks.copy()
    metrics.rank_pixels(maps, masks)
    np.testing.assert_array_equal(maps, copies[0])
    np.testing.assert_array_equal(masks, copies[1])


def test_images_whose_mask_is_not_known_count_no_pixels():
    rng = np.random.default_rng(0)
    maps, masks = rng.random((4, 6, 5)), rng.integers(0, 2, (4, 6, 5))
    known = np.array([True, False, True, True])
    found = metrics.rank_pixels(maps, masks, known=known)
    expected = metrics.rank_pixels(maps[known], masks[known])
    assert found.positives + found.negatives == 3 * 30
    for name in ("threshold", "tp", "fp", "overlap"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
