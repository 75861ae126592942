"""What a detector takes for one image, for several, and for none."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from configs import default
from prn_jax import evaluate, predict
from prn_jax.errors import UserError


@pytest.fixture
def detector(monkeypatch):
    """One without a network: a pixel's value is the mean of its channels."""

    def means(model, variables, images, mesh, score_pixels, **_):
        assert score_pixels == 7
        maps = images.mean(-1, dtype=np.float32) / 255
        return maps, maps.mean(axis=(1, 2)), maps.max(axis=(1, 2))

    monkeypatch.setattr(evaluate, "predict", means)
    config = default.get_config()
    config.image_size, config.score_pixels = (32, 32), 7
    return predict.Detector(None, None, config, 1, None, None, white_level=4095)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_one_image_gives_one_map_and_one_score(detector, tmp_path):
    image = draw(40, 60, 3)
    expected, score = detector(image)
    assert expected.shape == (40, 60)
    assert np.ndim(score) == 0
    assert detector.inspect(image).score == score < detector.inspect(image).distance
    Image.fromarray(image).save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    with Image.open(path) as opened:
        for given in (Image.fromarray(image), opened, path, str(path)):
            values, alike = detector(given)
            np.testing.assert_array_equal(values, expected)
            assert alike == score
    grey = draw(40, 60)
    for given in (grey, grey[..., None]):
        assert detector(given)[1] == detector(np.stack([grey] * 3, -1))[1]


def test_several_images_in_any_form_give_the_same(detector, tmp_path):
    images = draw(5, 40, 60, 3)
    maps, scores = detector(images)
    assert maps.shape == (5, 40, 60)
    assert scores.shape == (5,)
    apart = np.empty(5, object)
    apart[:] = list(images)
    for given in (list(images), tuple(images), (x for x in images), iter(images), apart,
                  [Image.fromarray(x) for x in images]):  # fmt: skip
        found, alike = detector(given)
        assert isinstance(found, list)
        np.testing.assert_array_equal(np.stack(found), maps)
        np.testing.assert_array_equal(alike, scores)
    grey = draw(5, 40, 60, 1)
    assert detector(grey)[0].shape == (5, 40, 60)
    paths = []
    for number, image in enumerate(images):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(image).save(paths[-1])
    np.testing.assert_array_equal(detector(np.array(paths))[1], scores)
    for nothing in ([], iter(()), images[:0]):
        assert [len(x) for x in detector(nothing)] == [0, 0]


def test_more_than_8_bits_are_read_as_in_training(detector, tmp_path):
    levels = np.random.default_rng(0).integers(0, 4096, (40, 60)).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    expected = detector((levels >> 4).astype(np.uint8))[1]
    for given in (levels, Image.fromarray(levels), tmp_path / "a.png"):
        assert detector(given)[1] == expected
    # Trained on 8 bits: each form has the same guess.
    levels[0, 0] = 4095
    Image.fromarray(levels).save(tmp_path / "a.png")
    guessing = dataclasses.replace(detector, white_level=0)
    expected = detector(levels)[1]
    for given in (levels, Image.fromarray(levels), tmp_path / "a.png"):
        assert guessing(given)[1] == expected


def test_levels_that_pillow_does_not_keep_are_refused(detector, tmp_path):
    levels = np.random.default_rng(0).integers(0, 4096, (40, 60, 3)).astype(np.uint16)
    expected = detector((levels >> 4).astype(np.uint8))[1]
    (tmp_path / "a.png").write_bytes(tf.io.encode_png(levels).numpy())
    (tmp_path / "a.ppm").write_bytes(b"P6 60 40 4095\n" + levels.astype(">u2").tobytes())
    (tmp_path / "a.pgm").write_bytes(b"P5 60 40 4095\n" + levels[..., 0].astype(">u2").tobytes())
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as image, pytest.raises(UserError, match="give its path"):
            detector(image)
        assert path.suffix == ".pgm" or detector(path)[1] == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (draw(3, 40, 60), r"channels come last: give image.transpose\(1, 2, 0\)"),
        (draw(2, 3, 40, 60), r"channels come last: give images.transpose\(0, 2, 3, 1\)"),
        ([draw(3, 40, 60)], "image 0: .*channels come last"),
        (draw(5, 40, 60), "several grey images in a list"),
        (draw(40, 60, 4), "without the fourth channel"),
        (draw(40, 60, 3).astype(np.float32), "float32: give uint8"),
        ([draw(40, 60, 3), draw(40, 60).astype(int)], "image 1: .*int64: give uint8"),
        (draw(0, 60, 3), r"shape \(0, 60, 3\)"),
        ([[1, 2], [3, 4]], "image 0: a list is no image"),
        (None, "NoneType: give an image"),
        ("nothing.png", "nothing.png: no such file"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused_in_words(detector, given, message):
    with pytest.raises(UserError, match=message):
        detector(given)


def test_a_large_map_is_resized_band_by_band(monkeypatch):
    values = np.random.default_rng(0).random((13, 9), np.float32)
    for size in ((50, 31), (6, 5)):
        monkeypatch.setattr(predict, "_BAND", 7)
        whole = Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_allclose(predict.resize_map(values, size), whole, atol=1e-6)
