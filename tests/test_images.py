import re

import numpy as np
import pytest
import tensorflow as tf
import tifffile
from absl import logging as absl_logging
from PIL import Image
from scipy import ndimage

from prn_jax import images
from prn_jax.errors import UserError
from prn_jax.masks import read_mask_file
from tests import trees


def _decode(data: bytes) -> np.ndarray:
    return tf.image.decode_image(data, channels=3).numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ext", ["png", "jpg"])
def test_plain_files_are_kept_byte_for_byte(tmp_path, ext, channels):
    path = tmp_path / f"a.{ext}"
    trees.save(path, trees.draw(0, channels=channels))
    data, size = images.read_image(path)
    assert data == path.read_bytes()
    assert size == trees.SIZE
    assert _decode(data).shape == (*trees.SIZE, 3)


@pytest.mark.parametrize("ext", ["bmp", "tif", "tiff", "TIF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_types_keep_their_pixels(tmp_path, ext, channels):
    array = trees.save(tmp_path / f"a.{ext}", trees.draw(0, channels=channels))
    data, _ = images.read_image(tmp_path / f"a.{ext}")
    expected = array if channels == 3 else np.stack([array] * 3, axis=-1)
    np.testing.assert_array_equal(_decode(data), expected)


@pytest.mark.parametrize("ext", ["png", "tif"])
def test_16_bit_grey_keeps_its_high_byte(tmp_path, ext):
    array = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    Image.fromarray(array).save(tmp_path / f"a.{ext}")
    data, size = images.read_image(tmp_path / f"a.{ext}")
    assert size == (2, 3)
    np.testing.assert_array_equal(_decode(data)[..., 1], [[0, 0, 1], [128, 254, 255]])


def test_16_bit_colour_png_becomes_8_bit(tmp_path):
    array = trees.draw(0).astype(np.uint16) * 257
    (tmp_path / "a.png").write_bytes(tf.io.encode_png(array).numpy())
    data, _ = images.read_image(tmp_path / "a.png")
    assert data[24] == 8
    np.testing.assert_array_equal(_decode(data), trees.draw(0))


def test_palette_and_alpha_become_rgb(tmp_path):
    rgba = trees.draw(0, channels=4)
    trees.save(tmp_path / "a.png", rgba)
    np.testing.assert_array_equal(_decode(images.read_image(tmp_path / "a.png")[0]), rgba[..., :3])
    palette = Image.fromarray(trees.draw(0)).quantize(16)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(
        _decode(images.read_image(tmp_path / "p.png")[0]), np.asarray(palette.convert("RGB"))
    )


def test_cmyk_becomes_rgb(tmp_path):
    grey = np.full((8, 8, 3), 96, np.uint8)
    Image.fromarray(grey).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    data, _ = images.read_image(tmp_path / "a.jpg")
    assert data.startswith(b"\x89PNG")
    assert np.abs(_decode(data).astype(int) - 96).max() <= 3


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera lay on its side: turn by 90 degrees clockwise.
    array = trees.draw(0)
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    data, size = images.read_image(tmp_path / "a.png")
    assert size == trees.SIZE[::-1]
    np.testing.assert_array_equal(_decode(data), np.rot90(array, k=-1))


@pytest.mark.parametrize(("name", "cut"), [("a.png", 60), ("a.jpg", 200), ("a.bmp", 100)])
def test_truncated_files_are_named(tmp_path, name, cut):
    path = tmp_path / name
    trees.save(path, trees.draw(0))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=f"{path}: not a readable image") as error:
        images.read_image(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("levels", [(300, 400), (300, 400, 3)])
def test_a_copy_whose_end_has_not_come_is_no_image(tmp_path, suffix, share, levels):
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{suffix}"
    smooth = ndimage.gaussian_filter(rng.integers(0, 256, levels), (3, 3, 0)[: len(levels)])
    Image.fromarray(np.uint8(smooth)).save(path)
    whole = path.read_bytes()
    images.read_array(path)
    kept = int(share * len(whole))
    path.write_bytes(whole[:kept] + bytes(len(whole) - kept))  # its length is there already
    with pytest.raises(UserError, match=f"a.{suffix}: not a readable image"):
        images.read_array(path)
    path.write_bytes(whole + bytes(4096))  # as some cameras fill a block
    images.read_array(path)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(UserError, match="a.png: not a readable image"):
        read_mask_file(tmp_path / "a.png")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match="f.tif: floating-point pixels"):
        images.read_image(tmp_path / "f.tif")


@pytest.mark.parametrize(
    "array",
    [
        np.array([[0, 255]], np.uint8),
        np.array([[0, 1]], np.uint8),
        np.array([[0, 7]], np.uint8),
        np.array([[100, 200]], np.uint8),
        np.array([[False, True]]),
        np.array([[0, 65535]], np.uint16),
        np.array([[0, 1]], np.uint16),
        np.array([[[0, 0, 0], [128, 0, 0]]], np.uint8),
        np.array([[[255, 255, 255, 0], [255, 0, 0, 255]]], np.uint8),  # erased, painted
    ],
)
@pytest.mark.parametrize("ext", ["png", "tif"])
def test_masks_of_any_kind_mark_the_second_pixel(tmp_path, array, ext):
    trees.save(tmp_path / f"m.{ext}", array)
    mask = read_mask_file(tmp_path / f"m.{ext}")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, [[0, 255]])


def _levels(seed: int, channels: int = 1) -> np.ndarray:
    shape = trees.SIZE if channels == 1 else (*trees.SIZE, channels)
    return np.random.RandomState(seed).randint(0, 65536, shape).astype(np.uint16)


GREY, COLOUR, INKS = _levels(0), _levels(1, 3), _levels(2, 4)
# What scanners and cameras write: the file's pixels, how it is written, and what is read; of what
# Pillow misreads or does not read, what is said.
TIFFS = {
    "0 is white, 8 bits": (GREY.astype(np.uint8), {"photometric": "miniswhite"}, 255 - GREY % 256),
    "0 is white": (GREY, {"photometric": "miniswhite"}, 65535 - GREY),
    "0 is white, tiles": (
        np.tile(GREY, (3, 3)), {"photometric": "miniswhite", "tile": (16, 16)},
        65535 - np.tile(GREY, (3, 3)),
    ),
    "0 is black, big-endian": (GREY, {"photometric": "minisblack", "byteorder": ">"}, GREY),
    "colour, big-endian": (COLOUR, {"photometric": "rgb", "byteorder": ">"}, COLOUR),
    "colour in strips": (COLOUR, {"photometric": "rgb", "rowsperstrip": 5}, COLOUR),
    "8-bit planes": (
        (COLOUR % 256).astype(np.uint8).transpose(2, 0, 1),
        {"photometric": "rgb", "planarconfig": "separate"}, COLOUR % 256,
    ),
    "planes": (
        COLOUR.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"},
        "planes of their own .*interleaved",
    ),
    "planes of ink": (
        INKS.transpose(2, 0, 1), {"photometric": "separated", "planarconfig": "separate"},
        "planes of their own .*interleaved",
    ),
    "float32": (GREY.astype(np.float32), {"photometric": "minisblack"}, "floating-point pixels"),
    "float64": (GREY.astype(np.float64), {"photometric": "minisblack"}, "no variant of it"),
    "32-bit colour": (COLOUR.astype(np.uint32), {"photometric": "rgb"}, "no variant of it"),
    "below 0": (
        -GREY.astype(np.int32), {"photometric": "minisblack"}, "from -.* do not fit 16 bits"
    ),
    "pages": (np.stack([GREY, 65535 - GREY]), {"photometric": "minisblack"}, GREY),
}  # fmt: skip


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("name", list(TIFFS))
def test_tiffs_are_read_right_or_refused(name, compression, tmp_path):
    pixels, options, expected = TIFFS[name]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, compression=compression, **options)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"^{path}: .*{expected}"):
            images.read_picture(path)
        return
    picture = images.read_picture(path)
    np.testing.assert_array_equal(picture.levels, expected)
    assert picture.pages == (2 if name == "pages" else 1)
    assert images.is_deep(path) == (picture.levels.dtype == np.uint16)


@pytest.mark.parametrize("byteorder", "<>")
def test_inks_of_16_bits_become_the_colours_of_8_bit_ones(tmp_path, byteorder):
    tifffile.imwrite(tmp_path / "a.tif", INKS, photometric="separated", byteorder=byteorder)
    expected = Image.fromarray((INKS >> 8).astype(np.uint8), "CMYK").convert("RGB")
    found = images.read_picture(tmp_path / "a.tif").levels
    np.testing.assert_array_equal(found, np.asarray(expected))
    # Eight bits are left of them: they say nothing of a camera's white.
    assert not images.is_deep(tmp_path / "a.tif")


@pytest.fixture
def said(caplog):
    """What was said, of what is said once in a process."""
    absl_logging._log_counter_per_token.clear()
    return lambda: [record.getMessage() for record in caplog.records]


def test_prediction_says_once_that_a_white_is_guessed(tmp_path, said):
    for number, highest in enumerate((900, 4000)):
        path = tmp_path / f"{number}.png"
        levels = np.full((4, 4), highest, np.uint16)
        Image.fromarray(levels).save(path)
        white = 1023 if highest == 900 else 4095
        assert (images.read_array(path) == highest * 256 // (white + 1)).all()
        assert (images.read_array(path, 8191) == highest // 32).all()
    (line,) = said()
    assert re.search(f"{tmp_path}/0.png .*level 1023 is taken for white, .*said once", line)


def test_prediction_says_once_that_a_file_holds_several_images(tmp_path, said):
    for name in "ab":
        pages = np.stack([GREY, GREY]).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"{name}.tif", pages, photometric="minisblack")
        images.read_array(tmp_path / f"{name}.tif")
    (line,) = said()
    assert re.search(f"{tmp_path}/a.tif holds 2 images: the first is read", line)


def test_what_a_palette_or_a_colour_says_is_transparent_is_not_marked(tmp_path):
    drawn = Image.new("P", (4, 3), 0)
    drawn.putpalette([255, 255, 255, 200, 0, 0])
    drawn.putpixel((2, 1), 1)
    drawn.save(tmp_path / "p.png", transparency=0)
    drawn.convert("RGB").save(tmp_path / "rgb.png", transparency=(255, 255, 255))
    grey = Image.new("L", (4, 3), 255)
    grey.putpixel((2, 1), 90)
    grey.save(tmp_path / "grey.png", transparency=255)
    expected = np.zeros((3, 4), bool)
    expected[1, 2] = True
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_mask_file(path) > 0, expected)


def test_what_a_disk_of_its_own_holds_is_no_image(tmp_path):
    trees.save(tmp_path / "a.png", trees.draw(0))
    for name in ("lost+found", "System Volume Information", "$RECYCLE.BIN"):
        trees.save(tmp_path / name / "b.png", trees.draw(0))
    found, skipped = images.find_images(tmp_path)
    assert [x.name for x in found] == ["a.png"]
    assert len(skipped) == 3
