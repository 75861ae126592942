"""The resize in exported graphs is the one that training uses, to the bit."""

import jax
import numpy as np
import pytest

from prn_jax import images
from prn_jax.errors import UserError
from prn_jax.export import resize

SIZES = [
    ((900, 900), (128, 128)), ((50, 70), (128, 96)), ((301, 200), (64, 96)), ((200, 301), (96, 64)),
    ((64, 500), (64, 96)), ((500, 96), (64, 96)), ((257, 255), (256, 256)), ((31, 700), (224, 32)),
    ((700, 31), (32, 224)), ((1, 1), (32, 32)), ((1024, 1224), (32, 64)), ((64, 96), (64, 96)),
]  # fmt: skip


@pytest.mark.parametrize(("given", "size"), SIZES)
def test_it_equals_pillows(given, size):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (*given, 3)).astype(np.uint8)
    # What rounds at the limits: black and white, and nothing but white.
    batch = np.stack([noise, (noise > 127) * np.uint8(255), np.full_like(noise, 255)])
    expected = np.stack([images.resize(image, size) for image in batch])
    found = jax.jit(lambda x: resize.resize(x, size))(batch)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("source", "target"), [(900, 128), (70, 128), (8000, 256), (33, 32)])
def test_factors_are_exact_in_half_precision_and_sums_in_single(source, target):
    whole = resize.weights(source, target)
    parts = resize._split(whole)
    np.testing.assert_array_equal(parts[0] * 2048 + parts[1], whole)
    for part in parts:
        np.testing.assert_array_equal(part.astype(np.float16).astype(int), part)
        assert 255 * np.abs(part).sum(axis=1).max() < 2**24


def test_what_would_not_be_exact_is_refused():
    resize.check((2048, 2448), (256, 256))
    with pytest.raises(UserError, match="input_size=8000,64: too large for a network of 64x64"):
        resize.check((8000, 64), (64, 64))
    with pytest.raises(UserError, match="give two numbers above 0"):
        resize.check((0, 64), (64, 64))
