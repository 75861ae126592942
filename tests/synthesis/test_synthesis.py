import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import ndimage

from configs import default
from prn_jax.errors import UserError
from prn_jax.synthesis import extended, foreground, textures
from prn_jax.synthesis.augment import Draws
from prn_jax.synthesis.blending import blend, difference, shown_part, soften, to_grey
from prn_jax.synthesis.perlin import PerlinNoise
from prn_jax.synthesis.samples import SEEN, SampleMaker
from prn_jax.synthesis.simulated import Simulate, roughness


def seed(number):
    return tf.constant([3, number], tf.int32)


def classic_perlin(height, width, rows, columns, angles):
    """Perlin's definition, pixel by pixel."""
    field = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v, u = y * rows / height, x * columns / width
            i, j = int(v), int(u)

            def at(di, dj, i=i, j=j, u=u, v=v):
                angle = angles[i + di, j + dj]
                return np.sin(angle) * (v - i - di) + np.cos(angle) * (u - j - dj)

            def fade(t):
                return 6 * t**5 - 15 * t**4 + 10 * t**3

            a, b = fade(v - i), fade(u - j)
            top = at(0, 0) * (1 - b) + at(0, 1) * b
            bottom = at(1, 0) * (1 - b) + at(1, 1) * b
            field[y, x] = top * (1 - a) + bottom * a
    return np.sqrt(2) * field


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 3), (3, 2)])
def test_perlin_noise_is_perlins_definition(row, column):
    noise = PerlinNoise(24, 40, max_exponent=3)
    found = noise(seed(0), tf.constant(row), tf.constant(column)).numpy()
    angles = tf.random.stateless_uniform([9, 9], seed(0), maxval=2 * np.pi).numpy()
    expected = classic_perlin(24, 40, 2**row, 2**column, angles.astype(float))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_blend_is_its_formula():
    rng = np.random.default_rng(0)
    image, content = rng.integers(0, 256, (2, 8, 9, 3)).astype(np.uint8)
    weight, opacity = rng.random((8, 9)).astype(np.float32), 0.3
    found = blend(tf.constant(image), tf.constant(content), tf.constant(weight), opacity).numpy()
    expected = image + opacity * weight[..., None].astype(float) * (content.astype(float) - image)
    assert np.abs(found - expected).max() <= 0.501


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_the_part_that_shows_is_told_by_its_neighbourhood(share):
    rng = np.random.default_rng(0)
    region = ndimage.gaussian_filter(rng.normal(size=(40, 56)), 4) > -0.02
    visible = rng.random((40, 56)) < np.linspace(0, 1, 56)  # ever more to the right
    found = shown_part(tf.constant(visible), tf.constant(region), share, 7).numpy()

    def total(mask):
        return ndimage.convolve(mask.astype(float), np.ones((7, 7)), mode="constant")

    expected = region & (total(visible & region) >= share * total(region) - 1e-6)
    np.testing.assert_array_equal(found, expected)
    assert not found[:, :8].any()
    np.testing.assert_array_equal(found[:, 48:], region[:, 48:])  # no holes


def test_simulated_anomalies_stay_on_the_foreground_and_change_nothing_else():
    config = default.get_config().synthesis
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 48, 3)).astype(np.uint8)
    on = np.zeros((64, 48), bool)
    on[10:50, 8:40] = True
    stuff = rng.integers(0, 256, (3, 64, 48, 3)).astype(np.uint8)
    simulate = Simulate((64, 48), tf.constant(stuff), config, self_source=True)
    shown = 0
    for number in range(20):
        made, shape = simulate(
            tf.constant(image), tf.constant(on), tf.constant(0.0), tf.constant(seed(number))
        )
        made, shape = made.numpy(), shape.numpy()
        assert not (shape & ~on).any()
        assert (made == image)[~shape].all()
        shown += (made != image)[shape].any()
    assert shown > 5


def test_the_shuffled_image_keeps_its_pixels():
    config = default.get_config().synthesis
    image = np.arange(48 * 40 * 3, dtype=np.uint32).reshape(48, 40, 3).astype(np.uint8)
    simulate = Simulate((48, 40), tf.constant(image[None]), config, self_source=True)
    found = simulate._shuffle(tf.constant(image), seed(1)).numpy()
    assert (found != image).any()
    np.testing.assert_array_equal(np.bincount(found.ravel()), np.bincount(image.ravel()))


def test_pieces_are_scipys_regions_and_whole_masks():
    masks = (np.random.default_rng(0).random((5, 30, 30)) > 0.9).astype(np.uint8)
    masks[3] = 0
    masks[3, 2, 2] = 1  # smaller than any region that is kept, and all there is
    masks[4] = 0
    pieces = extended.cut_pieces(masks, ["b", "a", "b", "c", "c"], min_pixels=4)
    assert [pieces.number[pieces.images[i]] for i in pieces.types[:-1]] == [1, 0, 3]
    assert len(pieces.types) - 1 == 3  # an empty mask gives nothing
    assert len(pieces.images) - 1 == 4
    expected = 1
    for mask in masks[:3]:
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        expected += 1 + sum(np.sum(labels == i) >= 4 for i in range(1, count + 1))
    assert len(pieces) == expected
    for first, number in zip(pieces.images[:-1], (1, 0, 2, 3)):
        assert (pieces.number[first], pieces.part[first]) == (number, 0)
        labels, _ = ndimage.label(masks[number], np.ones((3, 3)))
        np.testing.assert_array_equal(pieces.labels[number], labels)
    for number, part, centre in zip(pieces.number, pieces.part, pieces.centre):
        labels = pieces.labels[number]
        region = labels == part if part else labels > 0
        assert part == 0 or region.sum() >= 4
        rows, columns = np.nonzero(region)
        np.testing.assert_allclose(
            centre, [(rows[0] + rows[-1]) // 2, (columns.min() + columns.max()) // 2]
        )


def test_types_images_and_regions_are_drawn_in_this_order():
    config = default.get_config().synthesis
    masks = np.zeros((3, 32, 32), np.uint8)
    masks[0, 2:6, 2:6] = 1  # one type with one region
    masks[1:, ::8, ::8] = 1  # another with two images of sixteen regions each
    pictures = np.zeros((3, 32, 32, 3), np.uint8)
    extend = extended.Extend(pictures, masks, ["scratch", "dots", "dots"], config)
    drawn = [int(extend._draw_piece(Draws(seed(i), 16))) for i in range(300)]
    pieces = extended.cut_pieces(masks, ["scratch", "dots", "dots"], config.min_region)
    images = pieces.number[drawn]
    counts = np.bincount(images, minlength=3)
    # 300 draws: three standard deviations around a half and two quarters.
    np.testing.assert_allclose(counts, [150, 75, 75], atol=26)


@pytest.mark.parametrize("kind", ["simulated", "extended"])
def test_an_anomaly_is_marked_whole_and_grey_stays_grey(kind):
    config = default.get_config().synthesis
    rng = np.random.default_rng(0)
    # A texture whose values come again in what is pasted: single pixels often stay the same.
    image = to_grey(tf.constant(rng.integers(0, 4, (64, 64, 1)).repeat(3, -1) * 60, tf.uint8))
    everywhere = tf.ones((64, 64), tf.bool)
    stuff = rng.integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    mask = np.zeros((3, 64, 64), np.uint8)
    mask[:, 20:40, 10:30] = 1
    simulate = Simulate((64, 64), tf.constant(stuff), config, self_source=True, grey=True)
    extend = extended.Extend(stuff, mask, ["a", "a", "b"], config, grey=True)
    points = tf.constant([[32.0, 32.0]])
    holes = filled = marked = 0
    for number in range(20):
        if kind == "simulated":
            made, where = simulate(image, everywhere, tf.constant(0.0), tf.constant(seed(number)))
        else:
            made, where = extend(image, everywhere, points, Draws(seed(number)))
        np.testing.assert_array_equal(made[..., 0], made[..., 1])
        np.testing.assert_array_equal(made[..., 0], made[..., 2])
        changed = difference(image, made).numpy() > 0
        where = where.numpy()
        assert not (changed & ~where).any()
        holes += np.sum(ndimage.binary_fill_holes(where) & ~where)
        filled += np.sum(where & ~changed)
        marked += where.sum()
    assert marked > 1000
    assert filled > 0  # pixels that look as before are marked with the others
    if kind == "extended":
        assert holes < 0.01 * marked


def test_an_untransformed_piece_is_a_cut_and_paste():
    config = default.get_config().synthesis
    config.update(extended_spatial=0.0, extended_colour=0.0, extended_opaque=1.0, max_pastes=1)
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[4:10, 6:13] = 1  # the middle is (6.5, 9), and (6, 9) in whole pixels
    extend = extended.Extend(source[None], mask[None], ["scratch"], config)
    image = np.zeros((32, 32, 3), np.uint8)
    point = tf.constant([[20.0, 17.0]])
    everywhere = tf.ones((32, 32), tf.bool)
    made, where = extend(tf.constant(image), everywhere, point, Draws(seed(0)))
    np.testing.assert_array_equal(where.numpy(), np.roll(mask, (14, 8), (0, 1)) > 0)
    np.testing.assert_array_equal(made.numpy()[18:24, 14:21], source[4:10, 6:13])
    assert made.numpy().sum() == source[4:10, 6:13].sum()


def paste(config, sources, masks, names, number=0, image=None, middle=(20.0, 17.0)):
    """What `Extend` makes of an image of 32x32, black unless given."""
    image = np.zeros((32, 32, 3), np.uint8) if image is None else image
    extend = extended.Extend(np.stack(sources), np.stack(masks), names, config)
    everywhere, points = tf.ones((32, 32), tf.bool), tf.constant([middle])
    made, where = extend(tf.constant(image), everywhere, points, Draws(seed(number)))
    return made.numpy(), where.numpy()


@pytest.fixture
def plain_paste():
    config = default.get_config().synthesis
    config.update(extended_spatial=0.0, extended_colour=0.0, extended_opaque=1.0, max_pastes=1)
    return config


def rectangle(rows, columns):
    mask = np.zeros((32, 32), np.uint8)
    mask[slice(*rows), slice(*columns)] = 1
    return mask


def test_a_turned_piece_from_the_edge_has_no_dark_line(plain_paste):
    plain_paste.extended_spatial = 1.0
    source = np.full((32, 32, 3), 200, np.uint8)
    masks = [rectangle((0, 7), (9, 22))]
    darkest = []
    for number in range(20):
        # What is pasted fades into what is below, which is brighter.
        image = np.full((32, 32, 3), 250, np.uint8)
        made, where = paste(plain_paste, [source], masks, ["a"], number, image)
        darkest.append(made[where].min(initial=255))
    assert min(darkest) == 200


def test_a_piece_is_turned_scaled_and_mirrored_with_what_it_shows(plain_paste):
    plain_paste.extended_spatial = 1.0
    source = np.zeros((32, 32, 3), np.uint8)  # an L, each part of another colour; black around it
    for channel, box in enumerate((np.s_[8:12, 6:10], np.s_[8:12, 10:18], np.s_[12:20, 6:10])):
        source[box][..., channel] = 200
    mask = np.uint8(source.any(axis=-1))
    areas, hands, angles = [], set(), []
    for number in range(40):
        grey = np.full((32, 32, 3), 100, np.uint8)
        made, where = paste(plain_paste, [source], [mask], ["a"], number, grey, (16.0, 16.0))
        inside = ndimage.binary_erosion(where, np.ones((3, 3)))
        total = made[inside].sum(axis=-1, dtype=int)
        assert (abs(total - 200) < 9).all()  # neither black nor grey
        parts = np.argmax(made, axis=-1)
        red, green, blue = (np.mean(np.nonzero(where & (parts == i)), axis=1) for i in range(3))
        hands.add(np.sign(np.linalg.det([green - red, blue - red])))
        angles.append(np.arctan2(*(green - red)))
        areas.append(where.sum() / mask.sum())
    assert hands == {-1, 1}
    assert 0.2 < min(areas) < 0.5
    assert 1.6 < max(areas) < 2.5  # scales of 0.5 to 1.5, squared
    assert len(set(np.floor(np.array(angles) / (np.pi / 2)))) == 4


def test_a_piece_is_recoloured_and_let_through(plain_paste):
    colour, mask = np.array([150, 100, 60]), rectangle((8, 16), (9, 20))
    source = np.broadcast_to(colour, (32, 32, 3)).astype(np.uint8)
    luminance, found = np.array([0.299, 0.587, 0.114]), {"colour": set(), "opacity": set()}
    for number in range(12):
        plain_paste.update(extended_colour=1.0, extended_opaque=1.0)
        made, where = paste(plain_paste, [source], [mask], ["a"], number)
        (jittered,) = np.unique(made[where], axis=0)
        change = jittered @ luminance - colour @ luminance
        assert abs(change) < 0.2 * colour @ luminance + 30
        found["colour"].add(tuple(jittered))
        plain_paste.update(extended_colour=0.0, extended_opaque=0.0)
        made, where = paste(plain_paste, [source], [mask], ["a"], number)
        opacity = made[where] / colour
        np.testing.assert_allclose(opacity, np.median(opacity), atol=0.02)
        assert 0.5 <= np.median(opacity) <= 1
        found["opacity"].add(np.median(opacity).round(2))
    assert len(found["colour"] - {tuple(colour)}) > 8
    assert len(found["opacity"]) > 6


@pytest.mark.parametrize(("self_source", "is_object"), [(0.0, True), (1.0, True), (1.0, False)])
def test_what_a_simulated_anomaly_shows_and_how_much_of_it(self_source, is_object):
    config = default.get_config().synthesis
    config.update(operations=0, self_source=self_source)
    image = np.random.default_rng(0).integers(80, 120, (64, 64, 3)).astype(np.uint8)
    texture = np.broadcast_to(np.uint8([220, 10, 240]), image.shape)
    simulate = Simulate(image.shape[:2], tf.constant(texture[None]), config, is_object)
    everywhere, opacities = tf.ones(image.shape[:2], tf.bool), []
    for number in range(12):
        made, where = simulate(tf.constant(image), everywhere, tf.constant(0.0), seed(number))
        made, where = np.int32(made)[where], where.numpy()
        if self_source and is_object:  # the image's own pixels, from elsewhere
            assert made.min(initial=255) >= 80
            assert made.max(initial=0) < 120
        elif where.any():
            opacity = (made - image[where]) / (np.int32(texture)[where] - image[where])
            opacities.append(np.median(opacity))
            np.testing.assert_allclose(opacity, opacities[-1], atol=0.02)
    if opacities:
        assert 0.2 <= min(opacities) < 0.4
        assert 0.6 < max(opacities) <= 0.8
    else:
        assert self_source == is_object == 1


def test_a_region_that_does_not_show_is_drawn_anew(plain_paste):
    plain_paste.max_pastes = 3
    rng = np.random.default_rng(0)
    image = rng.integers(0, 200, (32, 32, 3)).astype(np.uint8)
    shift = (14, 8)
    hidden = np.roll(image, (-shift[0], -shift[1]), (0, 1))  # pasted, it is what lies below
    large, small = rectangle((2, 11), (3, 16)), rectangle((5, 8), (8, 11))
    for number in range(8):
        made, where = paste(
            plain_paste, [hidden, image + 50], [large, small], ["a", "b"], number, image
        )
        np.testing.assert_array_equal(where, np.roll(small, shift, (0, 1)) > 0)
        assert (made == image)[~where].all()
    made, where = paste(plain_paste, [hidden], [large], ["a"], 0, image)
    assert not where.any()
    np.testing.assert_array_equal(made, image)


def test_all_regions_of_a_mask_are_pasted_as_they_lie(plain_paste):
    plain_paste.extended_together = 1.0
    source = np.full((32, 32, 3), 200, np.uint8)
    mask = rectangle((4, 9), (6, 13)) | rectangle((15, 20), (2, 8))
    _, where = paste(plain_paste, [source], [mask], ["dent"], middle=(17.0, 17.0))
    labels, count = ndimage.label(where)
    assert count == 2
    np.testing.assert_array_equal(np.roll(where, (-6, -10), (0, 1)), mask > 0)


def test_a_small_dot_is_pasted_too(plain_paste):
    plain_paste.min_area = 0.5
    bright, dot = np.full((32, 32, 3), 200, np.uint8), rectangle((4, 5), (6, 8))
    made, where = paste(plain_paste, [bright], [dot], ["dot"])
    assert where.sum() == 2
    assert (made[where] == 200).all()


@pytest.mark.parametrize("sigma", [0.6, 1.5])
def test_what_is_pasted_is_softened_as_by_scipy(sigma):
    rng = np.random.default_rng(0)
    image = rng.integers(60, 160, (24, 30, 3)).astype(np.uint8)
    made = image.copy()
    made[:9, 5:12] += 80
    found = soften(tf.constant(image), tf.constant(made), sigma).numpy()
    change = made.astype(float) - image
    reach = {"truncate": np.ceil(3 * sigma) / sigma, "mode": "reflect"}
    expected = image + ndimage.gaussian_filter(change, (sigma, sigma, 0), **reach)
    assert np.abs(found - expected).max() <= 0.501
    np.testing.assert_array_equal(soften(tf.constant(image), tf.constant(made), 0.0), made)


def test_a_rough_product_on_a_smooth_table_is_rough():
    rng = np.random.default_rng(0)
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[:, 10:20, 10:20] = rng.integers(0, 200, (2, 10, 10, 1))
    on = np.zeros((2, 32, 32), np.uint8)
    on[0, 10:20, 10:20] = 1
    expected = np.median(np.abs(np.diff(images[0, 10:20, 10:20, 0].astype(float))))
    np.testing.assert_allclose(roughness(images, on), [expected, 0])


def test_where_no_attempt_is_plain_enough_the_last_one_stays():
    rng = np.random.default_rng(0)
    image, stuff = rng.integers(0, 256, (2, 64, 48, 3)).astype(np.uint8)
    config = default.get_config().synthesis
    simulate = Simulate((64, 48), tf.constant(stuff[None]), config, self_source=False)
    everywhere = tf.ones((64, 48), tf.bool)
    made = [simulate(tf.constant(image), everywhere, 500.0, seed(i))[1].numpy() for i in range(4)]
    assert sum(mask.any() for mask in made) >= 3  # one of them may have had no shape at all


def test_an_object_is_found_and_a_texture_is_all_foreground():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:128, :128]
    discs = []
    for _ in range(8):
        cy, cx = rng.integers(50, 78, 2)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < 35**2
        picture = np.where(disc[..., None], [60, 90, 160], [230, 228, 225])
        discs.append((disc, np.clip(picture + rng.normal(0, 6, (128, 128, 3)), 0, 255)))
    pictures = np.stack([p for _, p in discs]).astype(np.uint8)
    found, is_object = foreground.estimate_foreground(pictures)
    assert is_object
    for mask, (disc, _) in zip(found, discs):
        union, both = np.sum((mask > 0) | disc), np.sum((mask > 0) & disc)
        assert both / union > 0.85
        assert both == disc.sum()  # the edge is inside
    texture = rng.integers(0, 256, (8, 128, 128, 3)).astype(np.uint8)
    found, is_object = foreground.estimate_foreground(texture)
    assert not is_object
    assert found.all()
    assert "texture" in foreground.describe(found, is_object)


def boards(product, shape=(128, 144)):
    """Boards with tracks and holes, each a little shifted, and where the product lies on each."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: shape[0], : shape[1]]
    pictures, masks = [], []
    for _ in range(12):
        dy, dx = rng.integers(-4, 5, 2)
        picture = np.where(((x + dx) % 24 < 6)[..., None], [60, 40, 30], [180, 110, 90])
        hole = ((x + dx) % 24 - 15) ** 2 + ((y + dy) % 20 - 10) ** 2 < 25
        picture = np.where(hole[..., None], [20, 20, 20], picture)
        dy, dx = rng.integers(-2, 3, 2)
        body = (abs(y + dy - 52) < 24) & (abs(x + dx - 70) < 28)
        leads = (abs(abs(x + dx - 70) - 16) < 5) & (abs(y + dy - 88) < 14)
        if product:
            picture = np.where(body[..., None], [25, 25, 30], picture)
            picture = np.where(leads[..., None], [200, 200, 200], picture)
        masks.append(body | leads)
        pictures.append(np.clip(picture + rng.normal(0, 5, (*shape, 3)), 0, 255))
    return np.stack(pictures).astype(np.uint8), np.stack(masks)


def test_an_outline_has_no_staircase():
    y, x = np.mgrid[:256, :256]
    below = (x - 128) + 2 * (y - 128) > 0
    pictures = np.where((below & (abs(x - 128) < 90) & (abs(y - 128) < 90))[..., None],
                        [60, 90, 160], [230, 228, 225]).astype(np.uint8)[None]  # fmt: skip
    found, _ = foreground.estimate_foreground(pictures)
    blocks = found[0].reshape(128, 2, 128, 2)
    mixed = (blocks.max((1, 3)) != blocks.min((1, 3)))[30:100, 30:100]
    assert mixed.any(0).mean() > 0.9  # its border runs through squares of two pixels


def test_an_aligned_product_is_found_on_a_structured_background():
    pictures, products = boards(product=True)
    found, is_object = foreground.estimate_foreground(pictures)
    assert is_object
    for mask, product in zip(found > 0, products):
        assert (mask & product).sum() / (mask | product).sum() > 0.7
        assert (mask & product).sum() > 0.9 * product.sum()
        assert not mask[:, :16].any()  # neither tracks nor holes
        assert not mask[:, -16:].any()


def test_a_product_that_lies_anywhere_on_a_structured_background_is_not_told():
    pictures, _ = boards(product=True)
    moved = [np.roll(x, (20 * i, 24 * i), (0, 1)) for i, x in enumerate(pictures)]
    found, is_object = foreground.estimate_foreground(np.stack(moved))
    assert found.all()
    assert foreground.describe(found, is_object).startswith("everywhere")


def test_a_seen_anomaly_is_shifted_with_its_mask_and_made_brighter():
    config, size, most = default.get_config(), (64, 64), 6
    config.image_size = size
    config.synthesis.update(augment_seen=1.0, shift=most / 64, max_textures=2)
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=size), 3)
    grey = np.clip(128 + 20 * smooth / smooth.std(), 60, 190).astype(np.uint8)
    image, mask = np.repeat(grey[..., None], 3, -1), (grey > 130).astype(np.uint8)
    make = SampleMaker(
        config, normal=image[None], foreground=np.ones((1, *size), np.uint8), is_object=False,
        seen=image[None], seen_mask=mask[None], seen_defect=["hole"],
    )  # fmt: skip
    padded = [np.pad(x, most, mode="symmetric") for x in (mask, grey)]
    shifts = set()
    for slot in range(20):
        found, marked = (x.numpy() for x in make(tf.constant(SEEN), tf.constant(0, tf.int64),
                                                 tf.constant(slot, tf.int64)))  # fmt: skip
        places = [
            (row, column)
            for row in range(2 * most + 1)
            for column in range(2 * most + 1)
            if np.array_equal(marked, padded[0][row : row + 64, column : column + 64])
        ]
        ((row, column),) = places
        before = padded[1][row : row + 64, column : column + 64]
        gain, offset = np.polyfit(before.ravel(), found[..., 0].ravel(), 1)
        assert 0.89 < gain < 1.11
        assert abs(offset) < 11
        assert np.abs(gain * before + offset - found[..., 0]).max() < 1
        shifts.add((row, column))
    assert len(shifts) > 10


def test_foreground_points_lie_on_it():
    masks = np.zeros((2, 20, 30), np.uint8)
    masks[0, 3:7, 5:25] = 1
    masks[1, 10, 10] = 1
    points = foreground.foreground_points(masks).astype(int)
    for mask, own in zip(masks, points):
        assert mask[own[:, 0], own[:, 1]].all()
    assert len(np.unique(points[0], axis=0)) > 60


def test_textures_come_from_a_folder_searched_recursively(tmp_path):
    for i, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        path = tmp_path / f"sub{i}" / f"{i}.png"
        path.parent.mkdir()
        Image.new("RGB", (50, 40), colour).save(path)
    found = textures.load_textures(str(tmp_path), (16, 24), 10, data_dir="")
    assert found.shape == (3, 16, 24, 3)
    assert found[1, 0, 0].tolist() == [0, 255, 0]
    assert len(textures.load_textures(str(tmp_path), (16, 24), 2, data_dir="")) == 2
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="broken.png: not a readable image"):
        textures.load_textures(str(tmp_path), (16, 24), 10, data_dir="")


def test_textures_are_told_from_others_where_there_are_any(tmp_path):
    config = default.get_config()
    bundled = textures.fingerprint(config)
    config.synthesis.textures = str(tmp_path)
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    one = textures.fingerprint(config)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert len({bundled, one, textures.fingerprint(config), ""}) == 4
    config.synthesis.textures = str(tmp_path / "moved")  # what is trained can still be evaluated
    assert textures.fingerprint(config) == ""
    with pytest.raises(UserError, match="synthesis.textures=.*moved: no such folder"):
        textures.check(config)
    config.total_steps = 0
    textures.check(config)


def test_a_texture_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="synthesis.textures=.*no images"):
        textures.load_textures(str(tmp_path), (16, 24), 10, data_dir="")


def test_bundled_textures_leave_the_demo_s_own_photograph_out():
    everything = textures.load_textures("", (16, 16), 1000, data_dir="")
    without = textures.load_textures("", (16, 16), 1000, data_dir="", exclude="gravel")
    assert len(everything) - len(without) == 12
    some = textures.load_textures("", (16, 16), 20, data_dir="")
    np.testing.assert_array_equal(some, everything[textures.spread(len(everything), 20)])
    assert len(np.unique(without.reshape(len(without), -1), axis=0)) == len(without)


def test_the_foreground_is_read_from_its_cache_only_for_the_same_images(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pictures = rng.integers(190, 200, (4, 48, 70, 3)).astype(np.uint8)
    pictures[:, 14:34, 20:50] = (30, 60, 200)
    estimated, is_object = foreground.cached_foreground(pictures, tmp_path)
    assert is_object
    assert estimated.shape == pictures.shape[:3]
    assert [x.name for x in tmp_path.iterdir()] == ["foreground_48x70.npz"]

    def fail(images):
        raise AssertionError("estimated again")

    with monkeypatch.context() as patch:
        patch.setattr(foreground, "estimate_foreground", fail)
        again, is_object = foreground.cached_foreground(pictures, tmp_path)
        assert is_object
        np.testing.assert_array_equal(again, estimated)
        with pytest.raises(AssertionError):
            foreground.cached_foreground(pictures[::-1].copy() + 1, tmp_path)
    (tmp_path / "foreground_48x70.npz").write_bytes(b"PK\x03\x04 cut off")
    again, _ = foreground.cached_foreground(pictures, tmp_path)
    np.testing.assert_array_equal(again, estimated)
