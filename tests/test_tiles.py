"""Images larger than the network's: cutting, blending, and what is made of their tiles."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from prn_jax import evaluate, experiment, fitting, input_pipeline, splits
from prn_jax import mesh as meshes
from prn_jax import predict as prediction
from prn_jax.fields import checked
from prn_jax.models.prn import PRN
from prn_jax.tiles import Tiling
from tests import tiny

TILINGS = [
    Tiling((8, 12), (1, 1), 4),
    Tiling((8, 12), (3, 2), 4),
    Tiling((8, 12), (2, 3), 0),
    Tiling((8, 12), (1, 4), 5),
]
SIDE, OVERLAP = 64, 32
GRID = Tiling((SIDE, SIDE), (2, 3), OVERLAP)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def oracle(tiling, maps):
    """The weighted mean of all tiles over a pixel, in float64."""
    (h, w), (rows, columns), overlap = tiling.tile, tiling.grid, tiling.overlap

    def weight(length, first, last):
        ramp = np.ones(length)
        rising = (np.arange(overlap) + 0.5) / max(1, overlap)
        if overlap:
            ramp[:overlap] *= 1 if first else rising
            ramp[-overlap:] *= 1 if last else rising[::-1]
        return ramp

    total = np.zeros((len(maps) // tiling.count, *tiling.size))
    weights = np.zeros(tiling.size)
    for number, values in enumerate(maps.astype(np.float64)):
        image, place = divmod(number, tiling.count)
        i, j = divmod(place, columns)
        both = np.outer(weight(h, i == 0, i == rows - 1), weight(w, j == 0, j == columns - 1))
        y, x = i * (h - overlap), j * (w - overlap)
        total[image, y : y + h, x : x + w] += both * values
        weights[y : y + h, x : x + w] += both if image == 0 else 0
    np.testing.assert_allclose(weights, 1)
    return total


@pytest.mark.parametrize("tiling", TILINGS)
def test_maps_are_blended_as_weights_say(tiling):
    maps = np.random.default_rng(0).random((2 * tiling.count, *tiling.tile)).astype(np.float32)
    for found in (tiling.blend(maps), jax.jit(tiling.blend)(maps)):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, oracle(tiling, maps), atol=1e-6)
    constant = np.full_like(maps, 0.1)
    np.testing.assert_array_equal(tiling.blend(constant), np.float32(0.1))


@pytest.mark.parametrize("tiling", TILINGS)
def test_tiles_are_the_image_where_they_lie(tiling):
    images = drawn(2, *tiling.size, 3)
    tiles = tiling.cut(images)
    assert tiles.shape == (2 * tiling.count, *tiling.tile, 3)
    np.testing.assert_array_equal(jax.jit(tiling.cut)(images), tiles)
    for place in range(tiling.count):
        np.testing.assert_array_equal(tiles[place :: tiling.count], tiling.at(images, place))
    np.testing.assert_array_equal(tiling.blend(tiles.astype(np.float32)), images)


# --- maps, scores, distances ----------------------------------------------------------------------


class Pooled(PRN):
    """A network of which nothing is learned: features are means, the logit a smooth function."""

    def _channels(self):
        return (3, 3, 3)

    def _stages(self, image, doublings):
        image = image.astype(jnp.float32)

        def pooled(side):
            b, h, w, c = image.shape
            return image.reshape(b, h // side, side, w // side, side, c).mean(axis=(2, 4))

        return pooled(2), pooled(4), pooled(8), pooled(16), pooled(32)

    def decode(self, stages, train):
        # Means over 9x9 pixels of what is at the border repeated beyond it.
        features = stages[1]
        padded = jnp.pad(features[..., 0], ((0, 0), (1, 1), (1, 1)), mode="edge")
        b, h, w = features.shape[:3]
        mean = sum(padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)) / 9
        return jax.image.resize(mean, (b, 4 * h, 4 * w), "linear") / 64 - 2


def make(tiling=GRID, roi=None, count=1):
    """The network and its variables, on the host."""
    model = Pooled(tiling=tiling, attention_layers=0, num_centres=2, num_prototypes=count)
    rng = np.random.default_rng(1)
    whole = {"centres": rng.random((2, 12)).astype(np.float32) * 200, "spread": 1 + rng.random(12)}
    size = tiling.size if tiling else GRID.size
    roi = np.ones(size, np.uint8) if roi is None else roi
    return model, {"prototypes": {"whole": whole, "interest": {"mask": roi}}}


def predict(model, variables, images, devices=1, **options):
    mesh = meshes.create_mesh(jax.devices()[:devices])
    return evaluate.predict(model, meshes.replicate(mesh, variables), images, mesh, **options)


def smooth_image(size):
    y, x = (np.linspace(0, 1, n) for n in size)
    return np.repeat((255 * np.outer(0.2 + 0.7 * y, 0.9 - 0.6 * x))[None, ..., None], 3, -1)


def test_a_smooth_image_has_a_smooth_map_across_the_borders_of_tiles():
    image = smooth_image(GRID.size).astype(np.uint8)
    whole, *_ = predict(*make(None), image)
    maps, *_ = predict(*make(), image)
    inside = slice(8, -8)
    np.testing.assert_allclose(maps[0, inside, inside], whole[0, inside, inside], atol=1e-3)


def test_what_two_tiles_disagree_about_is_spread_over_the_overlap():
    # A map of 0 beside one of 1.
    maps = np.stack([np.full(GRID.tile, place % 2, np.float32) for place in range(GRID.count)])
    found = GRID.blend(maps)[0]
    steps = [np.abs(np.diff(found, axis=axis)).max() for axis in (0, 1)]
    assert max(steps) <= 1 / OVERLAP + 1e-6
    hard = dataclasses.replace(GRID, overlap=0).blend(maps)[0]
    assert np.abs(np.diff(hard, axis=1)).max() == 1


def test_neither_batch_nor_devices_matter_and_the_score_is_the_whole_images():
    images, (model, variables) = drawn(5, *GRID.size, 3), make()
    maps, scores, distances = predict(model, variables, images)
    for devices, batch in ((1, 2), (2, 7), (8, 64)):  # also fewer than a row of tiles has
        again = predict(model, variables, images, devices, batch_size=batch)
        for a, b in zip((maps, scores, distances), again, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5)
    np.testing.assert_allclose(scores, evaluate.image_score(jnp.asarray(maps), 100), rtol=1e-6)
    # As exports compute it, for any number of images.
    graph = jax.jit(lambda x: evaluate.stitched(model, variables, x))
    spec = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), *GRID.size, 3), jnp.uint8)
    found = jax.export.export(graph)(spec).call(images[:2])
    np.testing.assert_allclose(found[0], maps[:2], atol=1e-6)
    np.testing.assert_allclose(found[1], distances[:2], rtol=1e-5)
    empty = predict(model, variables, images[:0])
    assert [len(x) for x in empty] == [0, 0, 0]


def test_without_overlap_an_image_is_described_as_it_is_as_a_whole():
    tiling = Tiling((SIDE, SIDE), (2, 3), 0)
    images = drawn(3, *tiling.size, 3) // np.array([1, 2, 3], np.uint8)
    roi = np.zeros(tiling.size, np.uint8)
    roi[16:80, 32:96] = 1  # of some places a part, of some nothing
    found = predict(*make(tiling, roi), images)
    whole = predict(*make(None, roi), images)
    np.testing.assert_allclose(found[2], whole[2], rtol=1e-4)
    assert found[0][:, roi == 0].max() < 1e-12 < found[0][:, roi == 1].min()
    graph = evaluate.stitched(*make(tiling, roi), jnp.asarray(images))
    np.testing.assert_allclose(graph[0], found[0], atol=1e-6)
    np.testing.assert_allclose(graph[1], found[2], rtol=1e-5)
    mesh = meshes.create_mesh(jax.devices()[:2])
    model, variables = make(tiling, roi)
    described = evaluate.describe(model, meshes.replicate(mesh, variables), images, mesh, 4)
    apart = (
        described[:, None]
        - variables["prototypes"]["whole"]["centres"] / (variables["prototypes"]["whole"]["spread"])
    )
    np.testing.assert_allclose(np.linalg.norm(apart, axis=-1).min(1), found[2], rtol=1e-4)


# --- what trains ----------------------------------------------------------------------------------


def small_config(**fields):
    config = default.get_config()
    config.image_size, config.tiles, config.tile_overlap = (SIDE, SIDE), GRID.grid, OVERLAP
    config.update(fields)
    return checked(config)


def test_prototypes_are_those_of_their_place():
    config, count = small_config(), 2
    images = drawn(6, *GRID.size, 3)
    images[3:] //= 4  # two kinds of images: k-means cannot but tell them apart
    found = {}
    for devices in (1, 2):
        mesh = meshes.create_mesh(jax.devices()[:devices])
        model = Pooled(tiling=GRID, num_prototypes=count * GRID.count, num_centres=count)
        found[devices] = jax.device_get(fitting.fit_prototypes(config, model, {}, images, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *found.values())
    maps = found[1]["scale_1"]["maps"].reshape(GRID.count, count, 8, 8, 3)
    for place in range(GRID.count):
        tiles = GRID.at(images, place).astype(np.float64).reshape(6, 8, 8, 8, 8, 3).mean((2, 4))
        expected = np.stack([tiles[3:].mean(0), tiles[:3].mean(0)])
        ordered = maps[place][np.argsort(maps[place].mean((1, 2, 3)))]
        np.testing.assert_allclose(ordered, expected, rtol=1e-4)
    assert found[1]["whole"]["centres"].shape == (count, 12)


def test_tiles_are_the_samples_and_only_marked_ones_of_seen_anomalies():
    config = small_config()
    n, size = 2, GRID.size
    image, mask = drawn(n, *size, 3), np.zeros((n, *size), np.uint8)
    normal = splits.Images(image, mask, ["good"] * n, ["train/good/0", "train/good/1"])
    marked = mask.copy()
    marked[0, 2, 2] = 1  # in the first place alone
    marked[1, 40, 120] = 1  # where the last column's two tiles overlap
    seen = splits.Images(drawn(n, *size, 3, seed=1), marked, ["cut"] * n, ["a", "b"])
    foreground = np.zeros((n, *size), np.uint8)
    foreground[:, :, :40] = 1
    data = input_pipeline.CategoryData(normal, seen, normal, normal, foreground, True)
    tiles = input_pipeline.in_tiles(config, data)
    np.testing.assert_array_equal(tiles.train.image, GRID.cut(image))
    assert tiles.seen.id == ["a (1)", "b (3)", "b (6)"]
    assert tiles.seen.image.shape == (3, SIDE, SIDE, 3)
    # The last column is beside the product: anomalies may be anywhere there.
    np.testing.assert_array_equal(tiles.foreground[0], GRID.cut(foreground)[0])
    assert tiles.foreground[2].all()
    assert tiles.test is data.test  # whole
    # Of a region of interest a tile beside the product has its part, or none and does not train.
    roi = np.zeros(size, np.uint8)
    roi[:20, :70] = 1
    within = input_pipeline.in_tiles(config, dataclasses.replace(data, roi=roi))
    counts = GRID.cut(roi[None])
    keep = np.flatnonzero(np.tile(counts.any(axis=(1, 2)), n))
    assert 0 < len(keep) < n * GRID.count
    np.testing.assert_array_equal(within.train.image, GRID.cut(image)[keep])
    assert within.train.id == [tiles.train.id[i] for i in keep]
    beside = ~GRID.cut(foreground)[keep].any(axis=(1, 2))
    expected = np.where(
        beside[:, None, None], np.tile(counts, (n, 1, 1))[keep], tiles.foreground[keep]
    )
    np.testing.assert_array_equal(within.foreground, expected)
    assert within.seen.id == tiles.seen.id
    config.tiles = (1, 1)
    assert input_pipeline.in_tiles(config, data) is data


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_in_tiles_is_resumed_and_predicts_what_it_was_judged_by(tmp_path):
    config = tiny.run_config(tmp_path, size=(100, 90), train=3, **{
        "tiles": (2, 2), "tile_overlap": 16,
        "total_steps": 2, "checkpoint.every_steps": 1, "memory.patches": 8, "average_turns": True,
        "patch_map.weight": 0.5, "patch_map.patches": 8, "patch_map.backbone.name": "tiny",
        "patch_map.backbone.weights": "random",
    })  # fmt: skip
    folder = tmp_path / "work" / "bottle"

    def scores():
        experiment.train_and_evaluate(config, str(tmp_path / "work"))
        run = json.loads((folder / "results.json").read_text())
        return {x["id"]: x["score"] for x in run["test"]}

    whole = scores()
    shutil.rmtree(folder / "checkpoints" / "2")
    (folder / "results.json").unlink()
    assert scores() == whole  # resumed after step 1, to the bit
    detector = prediction.load(folder)
    assert detector.image_size == (112, 112)
    assert detector.model.num_prototypes == 4
    assert len(detector.model.turns) > 1
    names = [f"{tmp_path}/raw/bottle/{name}.png" for name in whole]
    maps, found = detector(names)
    assert {x.shape for x in maps} == {(100, 90)}
    np.testing.assert_allclose(found, list(whole.values()), atol=2e-3)
    one = dataclasses.replace(detector, mesh=meshes.create_mesh(jax.devices()[:1]))
    one = dataclasses.replace(
        one, variables=meshes.replicate(one.mesh, jax.device_get(detector.variables))
    )
    np.testing.assert_allclose(one(names)[1], found, atol=2e-3)
