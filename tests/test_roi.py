"""A region of interest: what lies outside of `roi.png` is neither made, nor scored, nor judged."""

import json
import pathlib
import types

import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import average_precision_score, roc_auc_score

from configs import default
from configs import folder as folder_config
from prn_jax import datasets, evaluate, experiment, input_pipeline, judge, metrics, splits
from prn_jax.errors import UserError
from prn_jax.synthesis.samples import EXTENDED, SEEN, SIMULATED
from tests import tiny
from tests.trees import make_mvtec, save

SIZE = (64, 64)


@pytest.fixture
def config(tmp_path):
    make_mvtec(tmp_path / "raw", "bolt", train=20, size=SIZE)
    config = folder_config.get_config()
    config.category = "bolt"
    config.image_size = SIZE
    config.num_seen = 3
    config.synthesis.max_textures = 5
    config.data.manual_dir = str(tmp_path / "raw")
    config.data.data_dir = str(tmp_path / "records")
    return config


def paint(config, region, size=SIZE):
    roi = np.zeros(size, np.uint8)
    roi[region] = 255
    return save(product(config) / "roi.png", roi) // 255


def product(config):
    return pathlib.Path(config.data.manual_dir) / "bolt"


def test_anomalies_are_made_and_masks_count_within_it(config, caplog):
    before = datasets.fingerprint("folder", "bolt", manual_dir=config.data.manual_dir,
                                  data_dir=config.data.data_dir)  # fmt: skip
    whole = input_pipeline.load_category(config, "bolt")
    assert whole.roi is None
    assert len(whole.held) == 2
    # The lower half alone, in another size and with one mask wholly above it.
    mask = np.zeros(SIZE, np.uint8)
    mask[2:9, 2:9] = 255
    save(product(config) / "ground_truth/contamination/000_mask.png", mask)
    paint(config, np.s_[64:, 8:100], (128, 128))
    data = input_pipeline.load_category(config, "bolt")
    assert data.fingerprint != before
    roi = np.zeros(SIZE, np.uint8)
    roi[32:, 4:50] = 1
    np.testing.assert_array_equal(data.roi, roi)
    for split in (data.seen, data.test):
        assert not split.mask[:, roi == 0].any()
    assert data.foreground.any(axis=(1, 2)).all()
    assert not data.foreground[:, roi == 0].any()
    everything = [*data.seen.id, *data.test.id]
    assert "test/contamination/000" in data.test.id
    assert len(everything) == 7
    outside = data.test.id.index("test/contamination/000")
    assert not data.test.has_mask[outside]
    assert data.test.label[outside] == 1
    assert "lie outside of the region of interest (" in caplog.text
    config.synthesis.turns = True  # noise has no pose; of 8 ways none leaves this region as it is
    make = tf.function(input_pipeline.sample_maker(config, data))
    for kind in (SEEN, EXTENDED, SIMULATED):
        for slot in range(6):
            image, marked = (x.numpy() for x in make(tf.constant(kind), tf.constant(0, tf.int64),
                                                     tf.constant(slot, tf.int64)))  # fmt: skip
            assert not marked[roi == 0].any()
            if kind != SEEN:
                np.testing.assert_array_equal(image[roi == 0], data.train.image[0][roi == 0])
                assert marked.any()


def test_a_black_region_and_other_proportions_are_said(config, caplog):
    paint(config, np.s_[:, :], (32, 64))
    assert input_pipeline.load_category(config, "bolt").roi.all()
    assert "of other proportions than roi.png" in caplog.text
    paint(config, np.s_[:0, :])
    with pytest.raises(UserError, match=r"bolt/roi.png is black: paint white what counts"):
        input_pipeline.load_category(config, "bolt")


def test_figures_are_those_of_the_pixels_within_it():
    rng = np.random.default_rng(0)
    masks = np.zeros((5, 20, 30), np.uint8)
    masks[1, 4:9, 6:12] = masks[2, 15:, 20:] = masks[3, 8:14, 10:28] = 1
    maps = (rng.random(masks.shape) + 0.5 * masks).astype(np.float32)
    roi = np.zeros((20, 30), np.uint8)
    roi[6:18, 5:25] = 1
    ranking = metrics.rank_pixels(maps, masks, roi)
    truth, values = masks[:, roi > 0].ravel(), maps[:, roi > 0].ravel()
    assert metrics.auroc(ranking) == pytest.approx(roc_auc_score(truth, values))
    assert metrics.average_precision(ranking) == pytest.approx(
        average_precision_score(truth, values)
    )
    # A rectangle of the image is an image.
    cut = metrics.rank_pixels(maps[:, 6:18, 5:25], masks[:, 6:18, 5:25])
    assert metrics.pro(ranking) == pytest.approx(metrics.pro(cut))


@pytest.mark.slow
def test_a_run_s_own_figures_are_of_it(tmp_path):
    config = tiny.run_config(tmp_path, size=SIZE, train=6, total_steps=1, **{"data.holdout": 0.34})
    roi = np.zeros(SIZE, np.uint8)
    roi[20:, 10:50] = 1
    save(tmp_path / "raw/bottle/roi.png", 255 * roi)
    # Defects that random masks of 64 pixels' side might place outside.
    for number in range(3):
        mask = np.zeros(SIZE, np.uint8)
        mask[5 * number :, 20 : 30 + number] = 255
        save(tmp_path / f"raw/bottle/ground_truth/broken/00{number}_mask.png", mask)
    experiment.train_and_evaluate(config, str(tmp_path / "work"))
    folder = tmp_path / "work" / "bottle"
    run = json.loads((folder / "results.json").read_text())
    with np.load(folder / "predictions.npz") as kept:
        maps, masks = (np.float64(kept[name]) for name in ("map", "mask"))
        np.testing.assert_array_equal(kept["roi"], roi)
    assert not maps[:, roi == 0].any()
    assert masks.any()
    inside = masks[:, roi > 0].ravel(), maps[:, roi > 0].ravel()
    # Maps are kept in 16 bits.
    assert run["metrics"]["pixel_auroc"] == pytest.approx(roc_auc_score(*inside), abs=2e-3)
    assert run["metrics"]["pixel_ap"] == pytest.approx(average_precision_score(*inside), abs=2e-3)
    everywhere = roc_auc_score(masks.ravel(), maps.ravel())
    assert abs(everywhere - run["metrics"]["pixel_auroc"]) > 0.02
    assert run["thresholds"]["pixel"] >= maps[:, roi > 0].min() > 0


@pytest.mark.parametrize("name", ["roi.PNG", "Roi.bmp", "ROI.tif"])
def test_a_region_may_be_written_otherwise_but_not_twice(config, name):
    roi = np.uint8(np.arange(64)[:, None] + np.arange(64) >= 2)
    save(product(config) / name, 255 * roi)
    np.testing.assert_array_equal(input_pipeline.load_category(config, "bolt").roi, roi)
    paint(config, np.s_[:, 8:])
    with pytest.raises(UserError, match=r"(?i)roi.* and roi.* are both there: keep one"):
        input_pipeline.load_category(config, "bolt")


def test_another_judgement_counts_the_same_pixels(monkeypatch):
    """A defect outside of the region, which the map does not show, is no missed one."""
    roi, masks = np.zeros((20, 30), np.uint8), np.zeros((3, 20, 30), np.uint8)
    roi[:, :15] = 1
    masks[1, 4:9, 3:8] = masks[2, 4:9, 18:25] = 1
    maps = masks * roi + np.float32(0.1)
    maps[2, 10:15, 3:8] = 0.9
    config = default.get_config()
    config.category, config.score_pixels = "bolt", 7
    detector = types.SimpleNamespace(
        roi=roi, model=None, variables=None, mesh=None, config=config, thresholds=None, step=1
    )
    scores = maps.max(axis=(1, 2))

    def predicted(*_, score_pixels, **__):
        assert score_pixels == 7
        return maps, scores, None

    monkeypatch.setattr(evaluate, "predict", predicted)
    found = splits.Images(
        np.zeros((3, 20, 30, 3), np.uint8), masks, ["good", "cut", "cut"], ["a", "b", "c"]
    )
    figures = judge.judge(detector, found)[0]["metrics"]
    assert figures["pixel_ap"] == figures["image_auroc"] == 1
