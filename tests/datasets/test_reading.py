import logging
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from absl import logging as absl_logging
from PIL import Image
from scipy import ndimage

from configs import default
from prn_jax import datasets, images, input_pipeline
from prn_jax.errors import UserError
from prn_jax.masks import resize_mask
from tests import trees


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.INFO, logger="absl")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture
def load(tmp_path):
    """Loads the product "cup" of `tmp_path` as a training does."""

    def load(num_seen=0, size=(64, 64), holdout=0.0):
        config = default.get_config()
        config.data.name, config.data.manual_dir = "folder", str(tmp_path / "raw")
        config.data.data_dir = str(tmp_path / "records")
        config.num_seen, config.image_size, config.data.holdout = num_seen, size, holdout
        return input_pipeline.load_category(config, "cup")

    return load


@pytest.fixture
def cup(tmp_path):
    trees.make_mvtec(tmp_path / "raw", "cup", defects={"dent": 4})
    return tmp_path / "raw/cup"


def _declare_bits(path, bits: int) -> None:
    """Puts an sBIT chunk behind a PNG's header."""
    data = path.read_bytes()
    chunk = b"sBIT" + bytes([bits])
    added = struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(data[:33] + added + data[33:])


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "colour"])
def test_a_cameras_range_is_found_and_used_alike(tmp_path, cup, load, bits, kind):
    levels, extension = {}, "png" if kind == "colour" else kind
    shape = (*trees.SIZE, 3) if kind == "colour" else trees.SIZE
    for number, path in enumerate(sorted((cup / "train/good").iterdir())):
        array = np.random.RandomState(number).randint(0, 2**bits, shape).astype(np.uint16)
        path.unlink()
        path = path.with_suffix(f".{extension}")
        if kind == "colour":
            path.write_bytes(tf.io.encode_png(array).numpy())
        else:
            Image.fromarray(array).save(path)
        levels[path] = array
    data = load(size=trees.SIZE)
    assert data.white_level == 2**bits - 1
    for image, (path, array) in zip(data.train.image, levels.items()):
        expected = array // 2 ** (bits - 8)
        expected = expected if kind == "colour" else np.stack([expected] * 3, axis=-1)
        np.testing.assert_array_equal(image, expected)
        np.testing.assert_array_equal(images.read_array(path, data.white_level), expected)


def test_a_declared_range_counts_and_what_is_above_is_clipped_and_said(cup, load, warnings):
    for path in (cup / "train/good").iterdir():
        Image.fromarray(np.full(trees.SIZE, 900, np.uint16)).save(path)
        _declare_bits(path, 12)
    bright = cup / "test/dent/000.png"
    Image.fromarray(np.full(trees.SIZE, 5000, np.uint16)).save(bright)
    data = load()
    assert data.white_level == 4095
    assert (data.train.image == 900 // 16).all()
    assert (data.test.image[data.test.id.index("test/dent/000")] == 255).all()
    assert any("above 4095, clipped" in line and str(bright) in line for line in warnings())


@pytest.mark.parametrize("extension", ["webp", "jfif", "ppm", "gif", "tga", "jp2", "BMP", "avif"])
def test_normals_of_any_type_in_sub_folders(cup, load, extension):
    folder = cup / "train/good/2024-11-25"
    trees.save(folder / f"000.{extension}", trees.draw(70))
    assert "train/good/2024-11-25/000" in load().train.id


def test_what_is_skipped_is_counted_and_named_before_any_error(cup, load, warnings):
    for path in (cup / "train/good").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"no training images; .*4 no type .*000.heic"):
        load()
    trees.save(cup / "train/good/000.png", trees.draw(0))
    for junk in ("._000.png", ".ipynb_checkpoints/000.png", "Thumbs.db", "000.json"):
        (cup / "train/good" / junk).parent.mkdir(exist_ok=True)
        (cup / "train/good" / junk).write_bytes(b"junk")
    (cup / "test/dent/000.png").write_bytes(b"")
    with pytest.raises(UserError, match="dent/000.png: not a readable image .*empty"):
        load()
    (line,) = (x for x in warnings() if "skipped" in x)
    assert all(x in line for x in ("._000.png", ".ipynb_checkpoints", "Thumbs.db", "000.json"))


def test_any_file_name_is_read(cup, load):
    name = os.fsdecode(b"pi\xe8ce\n[1].png")
    (cup / "train/good/000.png").rename(cup / "train/good" / name)
    assert "train/good/pi\\xe8ce\\n[1]" in load().train.id


@pytest.mark.parametrize("name", ["000_label", "000_gt", "000-mask", "mask_000", "000.jpg"])
def test_a_mask_of_another_name_is_asked_about(cup, load, name):
    masks = cup / "ground_truth/dent"
    (masks / "000_mask.png").rename(masks / f"{name}.png")
    with pytest.raises(UserError, match=r"did you mean 000_mask, the mask of .*dent/000.png\?"):
        load()


@pytest.mark.parametrize("name", ["ok", "OK", "Good", "normal"])
def test_a_folder_of_normal_images_is_asked_about(cup, load, name):
    (cup / "test/good").rename(cup / "test" / name)
    with pytest.raises(UserError, match=f"test/{name}: is this the folder of normal images.*good"):
        load()


@pytest.mark.parametrize("black", [False, True])
def test_defects_without_masks(cup, load, warnings, black):
    for path in sorted((cup / "ground_truth/dent").iterdir())[1:]:
        if black:
            trees.save(path, np.zeros(trees.SIZE, np.uint8))
        else:
            path.unlink()
    data = load(num_seen=1)
    assert data.seen.id == ["test/dent/000"]
    assert data.test.has_mask.tolist() == [False] * 3 + [True] * 2
    assert sum("3 anomalous images have no mask" in line for line in warnings()) == 1
    with pytest.raises(UserError, match="num_seen=2, but there are only 1 .*mask"):
        load(num_seen=2)


def test_an_inverted_mask_is_named(cup, load, warnings):
    path = cup / "ground_truth/dent/001_mask.png"
    trees.save(path, 255 - np.asarray(Image.open(path)))
    load()
    assert any("inverted" in line and str(path) in line for line in warnings())


def test_a_mask_is_marked_where_more_than_half_of_a_pixel_is():
    y, x = np.mgrid[:90, :60]
    disc = np.hypot(y - 42, x - 29) < 25
    halves = np.kron(disc, np.ones((4, 8)))  # 90 and 60 do not divide by 24 and 32
    area = halves.reshape(24, 15, 32, 15).mean(axis=(1, 3))
    np.testing.assert_array_equal(resize_mask(np.uint8(disc), (24, 32)), area > 0.5)


def test_thin_defects_keep_their_course_and_lost_ones_are_named(cup, load, warnings):
    scratch = np.zeros((1024, 1024), np.uint8)
    scratch[np.arange(100, 900), np.arange(100, 900) // 2] = 1  # a line, a pixel wide
    scratch |= np.roll(scratch, 1, axis=1) | np.roll(scratch, 2, axis=1)
    small = resize_mask(scratch, (128, 128))
    assert ndimage.label(small, np.ones((3, 3)))[1] == 1
    assert small.sum() >= 98  # of the 100 rows that it crosses
    dot = np.zeros((1024, 1024), np.uint8)
    dot[500:502, 500:502] = 255
    trees.save(cup / "test/dent/000.png", trees.draw(0, (1024, 1024)))
    trees.save(cup / "ground_truth/dent/000_mask.png", dot)
    data = load(num_seen=3)
    assert "test/dent/000" not in data.seen.id
    assert not data.test.has_mask[data.test.id.index("test/dent/000")]
    (line,) = (x for x in warnings() if "nothing is left of 1 masks" in x)
    assert "test/dent/000" in line
    size = tuple(map(int, re.findall(r"which image_size=\((\d+),(\d+)\) keeps", line)[0]))
    assert resize_mask(dot, size).any()
    with pytest.raises(UserError, match="num_seen=4, but there are only 3"):
        load(num_seen=4)


@pytest.mark.parametrize("options", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(40, 50), (90, 70)])
def test_training_and_prediction_see_the_same_pixels(cup, load, options, mode, size):
    path = cup / "train/good/000.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(trees.draw(3, size)).convert(mode).save(path, exif=exif, **options)
    data = load()
    image = data.train.image[data.train.id.index("train/good/000")]
    array = images.read_array(path, data.white_level)
    assert array.shape == (size[1], size[0], 3)
    np.testing.assert_array_equal(image, images.resize(array, (64, 64)))


def test_links_are_followed_once(tmp_path):
    trees.save(tmp_path / "a/x/000.png", trees.draw(0))
    trees.save(tmp_path / "b/001.png", trees.draw(1))
    for name, target in (("loop", "a"), ("up", "."), ("first", "a/x"), ("out", "b")):
        (tmp_path / "a" / name).symlink_to(tmp_path / target)
    found, skipped = images.find_images(tmp_path / "a")
    assert [x.relative_to(tmp_path / "a").as_posix() for x in found] == ["out/001.png", "x/000.png"]
    assert [x.name for x in skipped] == ["first", "loop", "up"]


def test_pillows_limit_is_off(tmp_path):
    assert Image.MAX_IMAGE_PIXELS is None
    Image.new("1", (20000, 10000)).save(tmp_path / "large.png")
    assert images.read_picture(tmp_path / "large.png").levels.shape == (10000, 20000)


@pytest.mark.parametrize("name", ["OK", "Good", "normal"])
def test_normal_images_under_another_name_are_asked_about(cup, load, name):
    (cup / "train/good").rename(cup / "train" / name)
    with pytest.raises(UserError, match=f"train/{name}: is this the folder of normal images"):
        load()


def test_masks_of_a_defect_in_another_case_are_asked_about(cup, load):
    (cup / "ground_truth/dent").rename(cup / "ground_truth/Dent")
    with pytest.raises(UserError, match="ground_truth/Dent: did you mean dent, the masks of"):
        load()


@pytest.mark.parametrize("name", ["dents", "Dents", "dint", "den"])
def test_masks_of_a_defect_under_a_like_name_are_asked_about(cup, load, name):
    trees.save(cup / "test/scratch/000.png", trees.draw(0))
    (cup / "ground_truth/dent").rename(cup / "ground_truth" / name)
    message = f"ground_truth/{name}: did you mean dent, the masks of {cup}/test/dent.*rename it"
    with pytest.raises(UserError, match=message):
        load()


def test_masks_of_no_defect_at_all_are_not_taken_for_anothers(cup, load):
    (cup / "ground_truth/dent").rename(cup / "ground_truth/scratch")
    with pytest.raises(UserError, match=r"scratch/000_mask.png: a mask without an image; add"):
        load()


def test_all_files_that_are_wrong_are_named_at_once(cup, load):
    good = cup / "train/good"
    levels = np.random.default_rng(0).integers(0, 4096, trees.SIZE)
    trees.save(good / "deep.png", levels.astype(np.uint16))
    for name in ("001.png", "002.png", "deep.png"):
        os.truncate(good / name, 60)
    (cup / "test/dent/000.png").write_bytes(b"")  # another split
    with pytest.raises(
        UserError, match="001.png: not a readable .*; wrong as well: 2 files: "
    ) as e:
        load()
    assert str(good / "002.png") in str(e.value)
    assert str(good / "deep.png") in str(e.value)
    for name in ("a.png", "b.png"):
        (good / name).symlink_to("nowhere")
    with pytest.raises(UserError, match="a.png: cannot be read: No such file .*: 1 file: .*b.png"):
        load()


@pytest.mark.parametrize("name", ["OK", "Normal", "no_defects"])
def test_a_misnamed_folder_in_one_of_several_products_is_asked_about(tmp_path, name):
    for product in ("bolt", "nut"):
        trees.make_mvtec(tmp_path / "raw", product)
    slip = tmp_path / "raw/nut/train" / name
    slip.with_name("good").rename(slip)
    message = f"{slip}: is this the folder of normal images.*nut/train/good"
    place = {"manual_dir": tmp_path / "raw", "data_dir": tmp_path / "records"}
    with pytest.raises(UserError, match=message):
        datasets.all_categories("folder", *place.values())
    with pytest.raises(UserError, match=message):
        datasets.fingerprint("folder", "nut", **place)
    # The other one is nothing to it where it is named.
    assert datasets.fingerprint("folder", "bolt", **place)


# --- slips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("000", "000_mask"), ("000", "mask_000"), ("000", "GT-000"), ("000", "masks/000"),
        ("rgb/000", "gt/000"), ("a/000", "a/label_000"),
    ],
)  # fmt: skip
def test_masks_among_the_images_are_asked_about(cup, load, image, mask):
    shutil.rmtree(cup / "test/dent")
    shutil.rmtree(cup / "ground_truth")
    trees.save(cup / f"test/dent/{image}.png", trees.draw(0))
    trees.save(cup / f"test/dent/{mask}.png", trees.draw_mask(0))
    with pytest.raises(UserError, match=rf"{mask}.png: is this the mask of .*{image}.png"):
        load()


def test_names_that_only_sound_like_masks_are_names(cup, load):
    for seed, name in enumerate(("label", "mask7", "masked_000", "shots/000", "gtx/000")):
        trees.save(cup / f"test/dent/{name}.png", trees.draw(90 + seed))
    assert len(load().test) == 2 + 4 + 5


def test_an_image_with_a_mask_of_its_own_is_no_mask(cup, load):
    trees.save(cup / "test/dent/label_000.png", trees.draw(90))
    trees.save(cup / "ground_truth/dent/label_000_mask.png", trees.draw_mask(0))
    assert "test/dent/label_000" in load().test.id


def test_good_images_with_black_masks_are_no_defect(cup, load):
    (cup / "test/good").rename(cup / "test/OK")
    for path in (cup / "test/OK").iterdir():
        trees.save(cup / "ground_truth/OK" / path.name, np.zeros(trees.SIZE, np.uint8))
    with pytest.raises(UserError, match="test/OK: is this the folder of normal images"):
        load()
    trees.save(cup / "ground_truth/OK/000.png", trees.draw_mask(0))  # a defect of that name
    assert "OK" in load().test.defect


def test_defects_of_several_levels_are_said_to_be_lost(cup, load, warnings):
    absl_logging._log_counter_per_token.clear()  # of what is said once in a process
    mask = np.zeros(trees.SIZE, np.uint8)
    mask[1:5, 1:5], mask[7:11, 9:13] = 100, 255
    trees.save(cup / "ground_truth/dent/000_mask.png", mask)
    load()
    assert [x for x in warnings() if "000_mask.png: areas of levels below half" in x]


# --- copies ---------------------------------------------------------------------------------------


def test_copies_of_what_is_trained_on_are_not_tested_on(cup, load, warnings):
    for number in range(4):  # each defect in a second folder too
        name = f"{number:03d}"
        for part, suffix in (("test", ""), ("ground_truth", "_mask")):
            (cup / part / "combined").mkdir(exist_ok=True)
            source = cup / part / "dent" / f"{name}{suffix}.png"
            shutil.copy(source, cup / part / "combined" / source.name)
    shutil.copy(cup / "train/good/000.png", cup / "test/good/50%_copy.png")
    data = load(num_seen=3)
    trained = {x.tobytes() for part in (data.train, data.seen) for x in part.image}
    assert not trained & {x.tobytes() for x in data.test.image}
    assert "test/good/50%_copy" not in data.test.id
    _, said = [x for x in warnings() if "are copies" in x]  # of each other, and of trained ones
    assert said.startswith("cup: ")
    assert "test/good/50%_copy" in said


def test_copies_of_what_is_tested_on_promise_nothing_twice(cup, load, warnings):
    held = load(holdout=0.5).held.id
    assert len(held) == 2
    shutil.copy(cup / f"{held[0]}.png", cup / "test/good/copy.png")
    assert load(holdout=0.5).held.id == held[1:]
    assert any(f"tested on and are left out: {held[0]}" in x for x in warnings())


def test_a_picture_that_is_normal_and_a_defect_is_said(cup, load, warnings):
    assert not [x for x in warnings() if "the other kind" in x]
    shutil.copy(cup / "test/dent/001.png", cup / "test/good/why.png")
    assert {"test/dent/001", "test/good/why"} <= set(load().test.id)
    (said,) = [x for x in warnings() if "the other kind" in x]
    assert said.endswith("and stay: remove the wrong ones of test/dent/001, test/good/why")


def test_each_image_is_held_out_once(cup, load, warnings):
    for number in range(4):  # all normal images are there twice: of what is left, pairs are held
        shutil.copy(cup / f"train/good/00{number}.png", cup / f"train/good/1{number}.png")
    held = load(holdout=0.75).held
    assert len(set(held.digests)) == len(held) > 0
    assert any("held out are copies of others of them" in x for x in warnings())


def test_a_draw_that_leaves_nothing_to_test_on_is_said(load, cup, warnings):
    load(num_seen=3)
    assert not [x for x in warnings() if "left to test on" in x]
    load(num_seen=4)
    assert [x for x in warnings() if "left to test on" in x]
