"""What people's folders hold beside the images: masks, copies, links, changes that hide."""

import logging
import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from configs import default
from prn_jax import datasets, errors, experiment, fields, images, input_pipeline, pictures
from prn_jax.errors import UserError
from prn_jax.masks import read_mask_file
from tests import tiny, trees


@pytest.fixture
def config(tmp_path):
    config = default.get_config()
    config.data.name, config.data.manual_dir = "folder", str(tmp_path / "raw")
    config.data.data_dir, config.num_seen = str(tmp_path / "records"), 0
    config.image_size = (64, 64)
    return config


@pytest.fixture
def cup(tmp_path):
    trees.make_mvtec(tmp_path / "raw", "cup", defects={"dent": 4})
    return tmp_path / "raw/cup"


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="absl")
    return lambda: "\n".join(x.getMessage() for x in caplog.records if x.levelno > logging.INFO)


def load(config, category="cup"):
    return input_pipeline.load_category(config, category)


def fingerprint(config, category="cup"):
    where = {"manual_dir": config.data.manual_dir, "data_dir": config.data.data_dir}
    return datasets.fingerprint(config.data.name, category, **where)


# --- what changed in place ------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_change_that_keeps_a_file_s_size_is_noticed(config, cup, place):
    path = cup / "train/good/big.bmp"
    trees.save(path, trees.draw(50, (200, 300)))
    before = fingerprint(config)
    data = bytearray(path.read_bytes())
    number = 60 if not place else min(round(place * (len(data) - 4096)) + 100, len(data) - 1)
    data[number] ^= 255
    path.write_bytes(data)
    assert fingerprint(config) != before


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["train/good/000_mask.png", "train/good/masks/000.png", "test/good/000_gt.png",
     "train/good/roi.png"],
)  # fmt: skip
def test_what_is_no_image_among_normal_ones_is_asked_about(config, cup, name):
    trees.save(cup / name, np.zeros((16, 16), np.uint8))
    what = "a region of interest" if "roi" in name else "the mask of .*/000.png"
    with pytest.raises(UserError, match=f"{name}: is this {what}"):
        load(config)


def test_labels_of_dagm_are_found_in_lower_case_and_asked_about_among_images(tmp_path):
    trees.make_dagm(tmp_path, "Class1")
    examples = datasets.BUILDERS["dagm2007"].scan("Class1", tmp_path)
    train = tmp_path / "Class1/Train"
    (train / "Label").rename(train / "label")
    again = datasets.BUILDERS["dagm2007"].scan("Class1", tmp_path)
    kinds = [[(x.id, x.defect) for x in some] for some in (examples, again)]
    assert kinds[0] == kinds[1]
    assert {x.defect for x in again if x.split == "train"} == {"good", "defect"}
    label = next((train / "label").glob("*_label.*"))
    shutil.copy(label, train / label.name)
    with pytest.raises(UserError, match=f"{label.name}: is this the mask of"):
        datasets.BUILDERS["dagm2007"].scan("Class1", tmp_path)


def test_a_mask_of_several_pages_is_refused(config, cup):
    first, second = (np.uint8(255 * (np.arange(16) < n)) for n in (4, 8))
    pages = [Image.fromarray(x[None].repeat(16, 0)) for x in (first, second)]
    (cup / "ground_truth/dent/000_mask.png").unlink()
    pages[0].save(cup / "ground_truth/dent/000_mask.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match=r"000_mask.tif holds 2 images: join"):
        load(config)


def test_several_masks_of_an_image_are_to_be_joined(config, cup):
    mask = cup / "ground_truth/dent/000_mask.png"
    shutil.copy(mask, mask.with_stem("000_mask_1"))
    mask.rename(mask.with_stem("000_mask_2"))
    with pytest.raises(UserError, match="join the 2 masks of .*/000.png into one, 000_mask"):
        load(config)


@pytest.mark.parametrize("level", [255, 100])
def test_a_mask_s_jpeg_traces_are_not_marked(tmp_path, level):
    marked = ndimage.zoom(np.pad(np.ones((3, 3)), 4), 12, order=0) > 0
    path = tmp_path / "mask.jpg"
    trees.save(path, np.uint8(level * marked), quality=60)
    levels = images.read_array(path)[..., 0]
    assert ((levels > 0) & ~marked).any()
    assert ((read_mask_file(path) > 0) != marked).mean() < 0.01


def test_masks_and_images_are_paired_however_their_letters_are_written(config, cup):
    composed, decomposed = (unicodedata.normalize(x, "Schräg") for x in ("NFC", "NFD"))
    for part, name in (("test", decomposed), ("ground_truth", composed)):
        (cup / part / "dent").rename(cup / part / name)
    (cup / "test" / decomposed / "000.png").rename(cup / "test" / decomposed / f"{decomposed}.png")
    mask = cup / "ground_truth" / composed
    (mask / "000_mask.png").rename(mask / f"{composed}_mask.png")
    cup.rename(cup.with_name(decomposed))
    assert datasets.available("folder", config.data.manual_dir) == [composed]
    config.category = decomposed
    found = load(config, fields.checked(config).category).test
    assert f"test/{composed}/{composed}" in found.id
    assert found.mask.any(axis=(1, 2)).sum() == 4


# --- copies and links -----------------------------------------------------------------------------


def test_links_under_test_lead_to_nothing_twice(config, cup, said):
    before = load(config).test.id
    for name, target in (("latest", "dent"), ("self", "."), ("up", "..")):
        (cup / "test" / name).symlink_to(target)
    assert load(config).test.id == before
    elsewhere = cup.parent.parent / "line 2"
    shutil.copytree(cup / "test/dent", elsewhere)
    trees.save(elsewhere / "000.png", trees.draw(60))
    (cup / "test/scratch").symlink_to(elsewhere)
    assert "test/scratch/000" in load(config).test.id


def test_a_copy_of_a_test_image_is_judged_once_and_with_its_mask(config, cup, said):
    shutil.copytree(cup / "test/dent", cup / "test/all")
    found = load(config).test
    assert [x for x in found.id if "good" not in x] == [f"test/dent/{i:03d}" for i in range(4)]
    assert "4 of 10 test images are copies of others of them and are left out: test/all" in said()


def test_a_defect_that_lies_among_the_normal_images_does_not_train_as_one(config, cup, said):
    for number in range(2):
        shutil.copy(cup / f"test/dent/{number:03d}.png", cup / f"train/good/x{number}.png")
    config.num_seen = 3
    assert load(config).train.id == [f"train/good/{i:03d}" for i in range(4)]
    assert "2 of 6 normal training images are defects, to the pixel, and are left out" in said()


# --- images, regions and products -----------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_jpeg_that_ends_in_zeros_is_cut_short(tmp_path, share):
    path = tmp_path / "a.jpg"
    trees.save(path, trees.draw(0, (400, 400)), quality=90)
    whole = path.read_bytes()
    # What cameras write behind the end, and padding, is none.
    path.write_bytes(whole + b"trailer" + bytes(600))
    images.read_array(path)
    path.write_bytes(whole[: int(share * len(whole))].ljust(len(whole), b"\0"))
    with pytest.raises(UserError, match="a.jpg: not a readable image"):
        images.read_array(path)


def test_a_region_of_which_nothing_is_left_is_refused(config, cup):
    region = np.zeros((1000, 1000), np.uint8)
    region[500:503, 500:503] = 255
    trees.save(cup / "roi.png", region)
    with pytest.raises(UserError, match=r"cup: nothing is left of roi.png at image_size=\(64, 64"):
        load(config)


def test_a_region_elsewhere_is_named_as_out_of_place(config, cup, said):
    for place in (cup.parent / "roi.png", cup / "roi_mask.png"):
        trees.save(place, np.zeros((16, 16), np.uint8))
    load(config)
    assert "raw/roi.png" in said()
    assert "cup/roi_mask.png" in said()


def test_a_product_that_is_left_out_is_named_and_a_hidden_one_is_none(config, cup, said):
    trees.save(cup.parent / "nut/Train/0.png", trees.draw(0))
    shutil.copytree(cup, cup.parent / ".cup_old")
    where = config.data.manual_dir, config.data.data_dir
    assert datasets.all_categories("folder", *where) == ["cup"]
    assert f"{cup.parent}/nut has Train, but no folder train/good: left out" in said()


def test_records_of_another_folder_say_whose_they_are(config, cup, tmp_path, said):
    load(config)
    config.data.manual_dir = str(tmp_path / "not mounted")
    load(config)
    assert f"using the TFRecords in {tmp_path}/records" in said()
    assert f"made from {cup}" in said()


def test_records_do_not_stand_for_a_folder_that_is_there(config, cup, tmp_path):
    load(config)
    config.data.manual_dir = str(tmp_path / "other")
    trees.save(tmp_path / "other/cup/0.png", trees.draw(0))  # not sorted into train/good
    with pytest.raises(UserError, match="neither .*/other/train/good nor "):
        load(config)
    where = config.data.manual_dir, config.data.data_dir
    with pytest.raises(UserError, match="neither") as error:
        datasets.all_categories("folder", *where)
    assert "TFRecords" not in str(error.value)
    trees.make_mvtec(tmp_path / "other", "lid")
    with pytest.raises(UserError, match="no category 'cap' in folder; there are lid"):
        load(config, "cap")


@pytest.mark.parametrize("name", ["masks", "Ground_Truth", "gt", "labels", "ground truth"])
def test_a_folder_of_masks_of_another_name_is_asked_about(config, cup, name):
    (cup / "ground_truth").rename(cup / name)
    (cup / "annotations").mkdir()
    (cup / "annotations/000.txt").write_text("0 0.5 0.5 0.1 0.1")  # no masks
    with pytest.raises(UserError, match=f"cup/{name}: is this the folder of masks\\? rename it"):
        load(config)


@pytest.mark.parametrize(
    ("name", "mask"), [("masks", "000"), ("ground_truth", "dent/000_mask"), ("labels", "001_gt")]
)
def test_a_folder_of_masks_among_the_defects_is_asked_about(config, cup, name, mask):
    shutil.rmtree(cup / "ground_truth")
    trees.save(cup / "test" / name / f"{mask}.png", trees.draw_mask(0))
    with pytest.raises(UserError, match=f"test/{name}: is this a folder of masks.* in .*/ground_"):
        load(config)
    # A defect of a label, with images of its own.
    (cup / "test" / name).rename(cup / "elsewhere")
    trees.save(cup / "test/label/torn.png", trees.draw(90))
    assert "test/label/torn" in load(config).test.id


def test_a_link_to_a_defect_with_masks_of_its_own_is_read_once(config, cup, said):
    (cup / "test/crack").symlink_to("dent")
    shutil.copytree(cup / "ground_truth/dent", cup / "ground_truth/crack")
    with pytest.raises(UserError, match="ground_truth/crack/000_mask.png: a mask without an im"):
        load(config)


def test_what_a_prediction_drew_is_no_image_of_the_product(config, cup, said):
    for ending in ("heat", "mask"):
        for place in ("train/good", "test/dent"):
            picture = Image.fromarray(trees.draw(7))
            pictures.save_png(cup / place / f"000_{ending}.png", picture, is_prediction=True)
    data = load(config)
    assert (len(data.train), len(data.test)) == (4, 6)
    assert "skipped 4 of predictions: " in said()


def test_transparent_pixels_and_other_proportions_are_said(config, cup, said):
    picture = np.dstack([trees.draw(9), np.full(trees.SIZE, 255, np.uint8)])
    trees.save(cup / "train/good/opaque.png", picture)
    picture[0, 0, 3] = 0
    trees.save(cup / "train/good/clear.png", picture)
    trees.save(cup / "train/good/tall.png", trees.draw(9, (32, 16)))
    load(config)
    assert f"transparent pixels, whose colours count: 1 file: {cup}/train/good/clear.png" in said()
    assert f"stretched to the same: 1 file: {cup}/train/good/tall.png" in said()


@pytest.mark.parametrize("place", ["", "cup", "cup/train/good/000.png"])
def test_nothing_is_written_among_the_images(config, cup, place):
    with pytest.raises(UserError, match="--output=.*among the images in .*/cup; give another"):
        datasets.check_outside(cup.parent / (place or "cup/new"), "--output", "folder", cup.parent)
    if place:
        return
    datasets.check_outside(cup.parent / "runs", "--output", "folder", cup.parent)
    config.category = "cup"
    with pytest.raises(UserError, match="--workdir=.*among the images"):
        experiment.train_and_evaluate(config, config.data.manual_dir)
    with pytest.raises(UserError, match="--workdir is empty"):
        experiment.train_and_evaluate(config, "")


def test_a_loop_of_links_is_no_folder(config, tmp_path):
    os.symlink("loop", tmp_path / "loop")
    config.data.manual_dir = str(tmp_path / "loop")
    with pytest.raises(UserError, match="no folder .*loop"):
        load(config)


def test_a_lower_case_mask_of_kolektor_is_asked_about(tmp_path):
    for name in ("0.png", "0_gt.png"):
        trees.save(tmp_path / "train" / name, trees.draw(0))
    with pytest.raises(UserError, match=r"0_gt.png: is this a mask\? rename it 0_GT.png"):
        datasets.BUILDERS["kolektor_sdd2"]._scan(tmp_path, [])


def test_names_are_compared_in_one_form():
    assert errors.normal_form("a\u0308") == "ä"


@pytest.mark.slow
def test_a_broken_product_stops_no_other(tmp_path, caplog):
    config = tiny.run_config(tmp_path, size=(64, 64), train=4, total_steps=1)
    for name in ("cable", "pill"):
        trees.make_mvtec(tmp_path / "raw", name, defects={"broken": 3}, size=(64, 64))
    path = tmp_path / "raw/cable/train/good/001.png"
    path.write_bytes(path.read_bytes()[:-200])
    config.category = "all"
    with pytest.raises(UserError, match=r"1 of 3 categories failed \(cable\).*the last one: .*001"):
        experiment.train_and_evaluate(config, str(tmp_path / "work"))
    assert "cable: " in caplog.text
    table = (tmp_path / "work/results.md").read_text()
    assert "| bottle |" in table
    assert "| pill |" in table
    assert "cable" not in table
