"""Which images a trained network is judged on."""

import shutil
import types

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score

from prn_jax import judge, trained_on
from prn_jax.errors import UserError
from prn_jax.identity import Identity
from prn_jax.splits import Images
from tests import tiny, trees


def test_images_whose_white_has_changed_are_refused(tmp_path):
    config = tiny.run_config(tmp_path, (32, 32), 4, **{"data.name": "folder"})
    deep = np.full((32, 32), 900, np.uint16)
    for path in (tmp_path / "raw/bottle").glob("t*/**/*.png"):
        Image.fromarray(deep).save(path)
    identity = Identity("folder", "bottle", "", (), 0, 1023, {})
    detector = types.SimpleNamespace(config=config, identity=identity, image_size=(32, 32))
    read = {"split": "test", "manual_dir": None}
    assert len(judge.read_own(detector, **read)) == 5
    shutil.copytree(tmp_path / "raw", tmp_path / "moved")
    (tmp_path / "moved/bottle/test/good/000.png").unlink()
    assert len(judge.read_own(detector, "test", str(tmp_path / "moved"))) == 4
    Image.fromarray(deep * 2).save(tmp_path / "raw/bottle/train/good/9.png")
    with pytest.raises(UserError, match=r"level 1023 was white .* now it is 4095 .*--images"):
        judge.read_own(detector, **read)


def test_what_is_odd_in_a_folder_to_judge_on_is_said(tmp_path, caplog):
    trees.make_mvtec(tmp_path, "cup", defects={"dent": 2})
    for name in ("ground_truth/dent/001_mask.png", "roi.png"):
        trees.save(tmp_path / "cup" / name, np.full(trees.SIZE, 255, np.uint8))
    deep = np.full(trees.SIZE, 1000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "cup/test/good/deep.png")
    config = types.SimpleNamespace(category="cup")
    detector = types.SimpleNamespace(config=config, image_size=(32, 32), white_level=4095)
    found = judge.read_folder(tmp_path / "cup", detector)
    assert len(found) == 4 + 3 + 2
    levels = found.image[found.id.index("test/good/deep")]
    assert np.abs(levels - 255 * 1000 / 4095).max() <= 1
    assert "more than half of the image, inverted?: " in caplog.text
    assert "dent/001_mask.png" in caplog.text
    assert "000_mask.png" not in caplog.text
    assert "roi.png is not read: the checkpoint's region of interest counts" in caplog.text


def test_recall_by_defect_and_f1_of_pixels_that_are_known():
    rng = np.random.default_rng(0)
    masks, defects = np.zeros((5, 6, 7), np.uint8), ["good", "cut", "cut", "dent", "dent"]
    masks[1:4, 2:5, 1:4] = 1  # the last one has none
    maps = np.float32(rng.random(masks.shape) * 0.6 + 0.4 * masks)
    found = Images(np.zeros((*masks.shape, 3), np.uint8), masks, defects, list("abcde"))
    scores = np.float32([0.6, 0.5, 0.4, 0.3, 0.9])
    figures = judge.at_thresholds(0.5, 0.55, found, maps, scores)
    assert figures["recalls"] == {"cut": 0.5, "dent": 0.5}
    assert (figures["recall"], figures["false_alarms"]) == (0.5, 1.0)
    expected = f1_score(masks[:4].ravel(), maps[:4].ravel() >= 0.55)
    assert figures["pixel_f1"] == pytest.approx(expected)


def test_what_was_trained_on_is_left_out(tmp_path, caplog):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    found = Images(pixels, np.zeros((3, 4, 4), np.uint8), ["good", "good", "dent"],
                   ["train/good/0", "test/good/0", "test/dent/1"])  # fmt: skip
    seen = types.SimpleNamespace(seen=("test/dent/1",))
    detector = types.SimpleNamespace(folder=tmp_path, identity=seen)
    # A training of before there was a record: by names.
    assert judge.leave_out_trained(found, detector).id == ["test/good/0"]
    assert "kept no record" in caplog.text
    # By pixels, whatever they are called.
    none = [found.pick([])] * 3
    trained_on.remember(tmp_path, found.pick([0]), *none, resumed=False)
    renamed = Images(found.image, found.mask, found.defect, ["test/good/9", *found.id[1:]])
    assert judge.leave_out_trained(renamed, detector).id == found.id[1:]
    twice = found.pick([0, 1, 2, 1])
    twice = Images(twice.image, twice.mask, twice.defect, [*found.id, "test/good/copy"])
    assert judge.leave_out_trained(twice, detector).id == found.id[1:]
    assert "1 of 3 images are copies of others of them and are left out: test/good/copy" in (
        caplog.text
    )
    trained_on.remember(tmp_path, found, *none, resumed=False)
    with pytest.raises(UserError, match="all these images were trained on"):
        judge.leave_out_trained(found, detector)
