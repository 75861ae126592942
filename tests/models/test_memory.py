"""Patches that are found anywhere, against plain NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from configs import default
from prn_jax.errors import UserError
from prn_jax.fields import checked
from prn_jax.identity import Identity, as_dict
from prn_jax.models import memory
from prn_jax.models.prn import PRN, create_model


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_coreset_takes_the_farthest_point_each_time():
    points = draw(60, 5).astype(np.float64)
    chosen = [int(np.square(points - points.mean(0)).sum(1).argmin())]
    for _ in range(11):
        distances = np.square(points[:, None] - points[chosen]).sum(-1).min(1)
        chosen.append(int(distances.argmax()))
    np.testing.assert_array_equal(memory.greedy_coreset(points.astype(np.float32), 12), chosen)


def test_a_coreset_of_more_than_there_are_holds_every_point():
    chosen = np.asarray(memory.greedy_coreset(draw(7, 3), 10))
    assert set(chosen.tolist()) == set(range(7))


def test_chosen_patches_are_averages_of_3x3_places():
    maps = draw(2, 4, 5, 3)
    found = memory.choose_patches(maps, 40, seed=0)
    padded = np.pad(maps.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    means = sum(padded[:, i : i + 4, j : j + 5] for i in range(3) for j in range(3)) / 9
    distance = np.abs(found[:, None] - means.reshape(1, -1, 3)).max(-1)
    assert distance.min(axis=1).max() < 1e-5
    # As many as there are, but half of them: else no normal image would be at a distance.
    assert (distance.min(axis=0) < 1e-5).sum() == 20


def test_the_nearest_patch_is_the_one_of_the_direct_computation(monkeypatch):
    monkeypatch.setattr(memory, "_CHUNK", 8)  # several parts, the last one not full
    points, patches = draw(50, 6), draw(21, 6, seed=1)
    direct = np.square(points[:, None].astype(np.float64) - patches).sum(-1)
    np.testing.assert_array_equal(
        memory.nearest_patch(jnp.asarray(points), jnp.asarray(patches)), direct.argmin(1)
    )


@pytest.mark.parametrize("window", [1, 3, 5])
def test_the_window_residual_equals_the_direct_computation(window):
    features, maps = draw(2, 4, 6, 3), draw(5, 4, 6, 3, seed=1)
    reach = window // 2
    expected = np.empty(features.shape)
    for b, y, x in np.ndindex(2, 4, 6):
        rows = slice(max(0, y - reach), y + reach + 1)
        near = maps[:, rows, max(0, x - reach) : x + reach + 1].reshape(-1, 3).astype(np.float64)
        difference = np.square(features[b, y, x].astype(np.float64) - near)
        expected[b, y, x] = difference[difference.sum(-1).argmin()]
    found = memory.window_residuals(jnp.asarray(features), jnp.asarray(maps), window)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_map_is_the_smoothed_distance_in_proportion_to_the_reference():
    residuals = np.square(draw(1, 16, 16, 4))
    logits = memory.PatchMap().apply(
        {"prototypes": {"reference": jnp.float32(2.0)}}, (jnp.asarray(residuals),), (1,)
    )
    distance = np.sqrt(residuals.sum(-1, dtype=np.float64))[0]
    larger = np.pad(distance, 1, mode="edge")
    larger = ndimage.zoom(larger, 2, order=1, mode="nearest", grid_mode=True)[2:-2, 2:-2]
    smooth = ndimage.gaussian_filter(larger, 4.0)
    np.testing.assert_allclose(jax.nn.sigmoid(logits[0]), smooth / (smooth + 2.0), atol=1e-4)


def test_untrained_a_strange_patch_stands_out_wherever_it_lies():
    model = PRN(num_patches=16, trained=False)
    image = jnp.asarray(np.random.default_rng(0).integers(100, 130, (2, 64, 64, 3), np.uint8))
    variables = dict(jax.jit(model.init)(jax.random.key(0), image))
    features = model.apply(variables, image, method="features")
    stored = dict(variables["prototypes"])
    for scale, maps in enumerate(features):
        patches = memory.choose_patches(np.asarray(maps), 16, 0)
        stored[f"memory_{scale}"] = {"patches": jnp.asarray(patches)}
    for top in (8, 40):
        strange = image[:1]
        strange = strange.at[:, top : top + 16, 40:56].set(jnp.array([255, 0, 0], jnp.uint8))
        logits = np.asarray(model.apply(variables | {"prototypes": stored}, strange))[0]
        row, column = np.unravel_index(logits.argmax(), logits.shape)
        assert top - 4 <= row < top + 20
        assert 36 <= column < 60


def shapes_of(**fields):
    config = checked(default.get_config())
    config.update_from_flattened_dict(fields)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    return jax.eval_shape(create_model(config, 2).init, jax.random.key(0), image)


def test_what_is_off_is_not_there():
    plain = shapes_of()
    assert not any(name.startswith("memory") for name in plain["prototypes"])
    assert not any(name.startswith("join") for name in plain["params"])
    both = shapes_of(**{"memory.patches": 8, "memory.window": 3, "memory.scales": (2, 3)})
    assert set(both["prototypes"]) >= {"memory_1", "memory_2"}
    assert "memory_0" not in both["prototypes"]
    assert both["prototypes"]["memory_1"]["patches"].shape == (8, 128)
    # Scale 1 has residuals of whole maps and of the window, the others of the memory as well.
    assert both["params"]["join_0"]["kernel"].shape == (1, 1, 2 * 64, 64)
    assert both["params"]["join_2"]["kernel"].shape == (1, 1, 3 * 256, 256)
    assert "fuse_features" not in shapes_of(**{"fusion.enabled": False})["params"]
    alone = shapes_of(**{"prototypes.enabled": False})
    assert "fuse_residuals" not in alone["params"]
    assert "decoder" not in shapes_of(**{"total_steps": 0, "memory.patches": 8})["params"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("patches", -1), ("scales", (0, 2)), ("scales", ()), ("window", 2), ("window", -1)],
)
def test_a_memory_that_makes_no_sense_is_refused(field, value):
    config = default.get_config()
    config.memory[field] = value
    with pytest.raises(UserError, match=rf"memory\.{field}="):
        checked(config)


def test_an_untrained_run_is_not_gone_on_with():
    config = checked(default.get_config())
    config.memory.patches = 8
    trained = Identity("demo", "gravel", "", (), 20, 0, as_dict(config))
    config.total_steps = 0
    untrained = Identity("demo", "gravel", "", (), 0, 0, as_dict(config))
    for saved, now in ((trained, untrained), (untrained, trained)):
        with pytest.raises(UserError, match="without training"):
            saved.check(now, "the run", allow=True)
    assert untrained.check(untrained, "the run") == untrained
