import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from prn_jax.synthesis import augment
from prn_jax.synthesis.augment import Draws


@pytest.fixture
def image():
    rng = np.random.default_rng(0)
    return ndimage.gaussian_filter(rng.integers(0, 256, (40, 56, 3)), (2, 2, 0)).astype(np.uint8)


def number(x):
    return tf.constant(x, tf.float32)


def test_a_quarter_turn_is_numpys(image):
    square = image[:, :40]
    turned = augment.rotate(tf.constant(square), number(np.pi / 2)).numpy()
    # Clockwise; interpolated values are cut off to whole grey levels.
    assert np.abs(turned.astype(int) - np.rot90(square, -1)).max() <= 1


def test_warp_moves_scales_and_flips_like_scipy(image):
    angle, scale = 0.4, 1.3
    source, target = np.array([18.0, 25.0]), np.array([22.0, 30.0])
    for flip in (1.0, -1.0):
        found = augment.warp(
            tf.constant(image, tf.float32),
            number(angle),
            number(scale),
            number(source),
            number(target),
            number(flip),
        ).numpy()
        # scipy's affine_transform wants the map from output to input as well, in (row, column).
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        matrix = np.array([[cos, -sin], [flip * sin, flip * cos]])
        offset = source - matrix @ target
        expected = np.stack(
            [
                ndimage.affine_transform(image[..., c].astype(float), matrix, offset, order=1)
                for c in range(3)
            ],
            -1,
        )
        inside = (slice(8, -8), slice(8, -8))
        # The pixels at the border of what is known are filled differently.
        assert np.mean(np.abs(found - expected)[inside] > 0.05) < 0.02


def test_hue_and_saturation_at_rest_leave_the_image(image):
    found = augment.hue_saturation(tf.constant(image), number(0.5), number(0.5)).numpy()
    assert np.abs(found.astype(int) - image).max() <= 1


def test_hue_keeps_the_luminance(image):
    grey = (image // 4 + 96).astype(np.uint8)  # far from where values saturate
    found = augment.hue_saturation(tf.constant(grey), number(0.9), number(0.5)).numpy()
    weights = [0.299, 0.587, 0.114]
    assert np.abs(found @ weights - grey @ weights).max() < 1.5
    assert np.abs(found.astype(int) - grey).max() > 3


def only(position):
    """Draws that choose one operation, and neutral or known strengths."""

    class Fixed:
        def vector(self, count):
            if count == 10:
                return tf.constant([0.0 if i == position else 1.0 for i in range(10)])
            return tf.fill([count], 0.5)

    return Fixed()


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (4, lambda x: (x // 8) * 8),  # posterize: 2 ** floor(1 + 5 * 0.5)
        (5, lambda x: 255 - x),
        (3, lambda x: np.where(x >= 80, 255 - x, x)),  # solarize: 32 + 96 / 2
    ],
)
def test_lookups_are_their_formulas(image, position, expected):
    order = ["gamma", "bright", "solarize", "posterize", "invert", "autocontrast", "equalize"]
    index = {3: order.index("solarize"), 4: order.index("posterize"), 5: order.index("invert")}
    found = augment.some_of_ten(tf.constant(image), only(index[position]), 1).numpy()
    np.testing.assert_array_equal(found, expected(image))


def test_autocontrast_and_equalize_are_close_to_pillows():
    noise = np.random.default_rng(0).integers(0, 256, (160, 224, 3))
    image = ndimage.gaussian_filter(noise, (2, 2, 0)).astype(np.uint8)
    for position, reference in ((5, ImageOps.autocontrast), (6, ImageOps.equalize)):
        found = augment.some_of_ten(tf.constant(image), only(position), 1).numpy()
        expected = np.asarray(reference(Image.fromarray(image)))
        # Their histograms are those of a sixteenth of the pixels.
        assert np.abs(found.astype(int) - expected).mean() < 8


@pytest.mark.parametrize("count", [0, 1, 3, 10])
def test_so_many_of_the_ten_operations_are_applied(image, count, monkeypatch):
    used = []
    table = augment._lookup_table

    def lookups(image, use, strength):
        used.extend(number for number, chosen in enumerate(use) if chosen)
        return table(image, use, strength)

    monkeypatch.setattr(augment, "_lookup_table", lookups)
    for number, name in enumerate(("hue_saturation", "sharpen", "rotate"), start=7):
        monkeypatch.setattr(augment, name, lambda x, *_, n=number: used.append(n) or x)
    for i in range(30):
        augment.some_of_ten(tf.constant(image), Draws(tf.constant([7, i])), count)
        assert len(set(used[i * count :])) == len(used) - i * count == count
    assert count < 3 or set(used) == set(range(10))


def test_three_different_operations_are_drawn(image):
    made = [
        augment.some_of_ten(tf.constant(image), Draws(tf.constant([7, i])), 3).numpy().tobytes()
        for i in range(12)
    ]
    assert len(set(made)) > 9
    again = augment.some_of_ten(tf.constant(image), Draws(tf.constant([7, 0])), 3).numpy()
    assert again.tobytes() == made[0]


def test_draws_are_within_their_ranges_and_run_out_loudly():
    draws = Draws(tf.constant([1, 2]), 64)
    values = [float(draws.uniform(2.0, 3.0)) for _ in range(30)]
    assert min(values) >= 2
    assert max(values) < 3
    assert {int(draws.integer(3)) for _ in range(20)} == {0, 1, 2}
    with pytest.raises(ValueError, match="more random numbers"):
        draws.vector(30)


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.9])
def test_sharpness_is_pillows(image, strength):
    found = augment.sharpen(tf.constant(image), number(strength)).numpy()
    expected = ImageEnhance.Sharpness(Image.fromarray(image)).enhance(2 * strength)
    difference = np.abs(found.astype(int) - np.asarray(expected))[1:-1, 1:-1]
    assert difference.max() <= 2  # Pillow rounds on the way
    assert difference.mean() < 0.6
