import logging

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from configs import default
from prn_jax import input_pipeline
from prn_jax.splits import Images
from prn_jax.synthesis import pose
from prn_jax.synthesis.samples import SEEN, SampleMaker

EVERY = [(quarter, mirrored) for quarter in range(4) for mirrored in (False, True)]


def smooth(*shape, seed=0):
    """Noise without a pose, uint8 [n, h, w, 3]."""
    noise = np.random.default_rng(seed).normal(size=shape)
    noise = ndimage.gaussian_filter(noise, (0, 3, 3))
    noise = 128 + 30 * noise / noise.std()
    return np.repeat(np.clip(noise, 0, 255).astype(np.uint8)[..., None], 3, -1)


def marked(images, *boxes):
    """Images with a bright part that lies alike on all of them."""
    images = images.copy()
    for rows, columns in boxes:
        images[:, rows, columns] = 250
    return images


TOP, LEFT, RIGHT = slice(5, 20), slice(5, 20), slice(44, 59)


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([], EVERY),
        ([(TOP, LEFT)], [(0, False), (3, True)]),  # mirrored at a diagonal it lies as before
        ([(TOP, LEFT), (TOP, RIGHT)], [(0, False), (0, True)]),
        ([(TOP, LEFT), (slice(25, 35), RIGHT)], [(0, False)]),
    ],
)
def test_the_normal_images_tell_how_a_product_may_lie(boxes, expected):
    images = marked(smooth(40, 64, 64), *boxes)
    assert pose.free_turns(images) == expected


def test_images_that_are_not_square_are_not_turned_by_quarters():
    assert {quarter for quarter, _ in pose.free_turns(smooth(30, 64, 96))} == {0, 2}
    assert pose.free_turns(smooth(2, 64, 64)) == [(0, False)]


def test_a_region_of_interest_stays_where_it_is():
    images, roi = smooth(40, 64, 64), np.zeros((64, 64), np.uint8)
    assert pose.free_turns(images, roi) == EVERY
    roi[:, :9] = 1
    assert pose.free_turns(images, roi) == [(0, False), (2, True)]
    roi[:, -9:] = 1
    assert pose.free_turns(images, roi) == [x for x in EVERY if x[0] in (0, 2)]


@pytest.mark.parametrize(
    ("boxes", "count", "told"),
    [
        ([], 8, ["mean over 8 of 8", "has no pose"]),
        ([(TOP, LEFT)], 2, ["mean over 2 of 8", "has no pose"]),
        ([(TOP, LEFT), (slice(25, 35), RIGHT)], 1, ["has a pose"]),
    ],
)
def test_a_run_says_what_the_product_s_pose_means_for_it(boxes, count, told, caplog):
    images = marked(smooth(40, 64, 64), *boxes)
    nothing = np.zeros((40, 64, 64), np.uint8)
    train = Images(images, nothing, ["good"] * 40, [str(x) for x in range(40)])
    data = input_pipeline.CategoryData(train, train, train, train, nothing + 1, True)
    config = default.get_config()
    config.image_size = (64, 64)
    config.backbone.doublings, config.average_turns = (), True
    with caplog.at_level(logging.INFO):
        assert len(input_pipeline.turns(config, data)) == count
    assert len(caplog.messages) == len(told)
    assert all(x in message for x, message in zip(told, caplog.messages))


@pytest.mark.parametrize("which", range(8))
def test_a_turn_is_numpys(which):
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    found = pose.turn(tf.constant(image), EVERY, tf.constant(which)).numpy()
    quarter, mirrored = EVERY[which]
    expected = np.rot90(image, quarter)
    np.testing.assert_array_equal(found, expected[:, ::-1] if mirrored else expected)


@pytest.mark.parametrize("turns", [False, True])
def test_samples_are_turned_with_their_masks(turns):
    config = default.get_config()
    config.image_size = (64, 64)
    config.synthesis.turns = turns
    config.synthesis.augment_seen = 0.0
    config.synthesis.max_textures = 2
    normal = smooth(10, 64, 64)
    seen = smooth(1, 64, 64, seed=1)
    mask = (seen[..., 0] > 128).astype(np.uint8)
    make = SampleMaker(
        config,
        normal=normal,
        foreground=np.ones((10, 64, 64), np.uint8),
        is_object=False,
        seen=seen,
        seen_mask=mask,
        seen_defect=["hole"],
    )
    ways = set()
    for slot in range(64):
        image, found = make(
            tf.constant(SEEN), tf.constant(0, tf.int64), tf.constant(slot, tf.int64)
        )
        np.testing.assert_array_equal(found, image.numpy()[..., 0] > 128)
        ways.add(image.numpy().tobytes())
    expected = {
        (x[:, ::-1] if mirrored else x).tobytes()
        for quarter, mirrored in EVERY
        for x in [np.rot90(seen[0], quarter)]
    }
    assert ways == (expected if turns else {seen[0].tobytes()})
