import logging

import jax
import numpy as np
import pytest

from configs import default
from prn_jax import evaluate, fitting, train
from prn_jax import mesh as meshes
from tests import tiny


def test_prototypes_are_made_of_some_images_where_there_are_many():
    tiny.register()
    config = default.get_config()
    config.update_from_flattened_dict(tiny.FIELDS)
    config.memory.patches = 4
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    mesh = meshes.create_mesh(jax.devices()[:2])
    model = train.create_model(config, 2)
    variables = meshes.replicate(mesh, train.create_variables(config, model))

    def fit(images, most):
        config.prototypes.max_images = most
        found = fitting.fit_prototypes(config, model, variables, images, mesh)
        return jax.tree.map(np.asarray, found)

    some = fit(images, 3)
    jax.tree.map(np.testing.assert_array_equal, some, fit(images[[0, 2, 4]], 1000))
    assert np.abs(fit(images[:3], 1000)["scale_2"]["maps"] - some["scale_2"]["maps"]).max() > 0


def test_each_look_compares_with_what_it_sees_itself():
    tiny.register()
    config = default.get_config()
    config.update_from_flattened_dict(tiny.FIELDS)
    config.total_steps, config.memory.patches, config.memory.scales = 0, 4, (3,)
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    mesh = meshes.create_mesh(jax.devices()[:1])
    found = {}
    for doublings in ((0, 1), (0,), (1,)):
        config.backbone.doublings = doublings
        model = train.create_model(config, 1)
        variables = meshes.replicate(mesh, train.create_variables(config, model))
        stored = fitting.fit_prototypes(config, model, variables, images, mesh)
        found[doublings] = jax.tree.map(np.asarray, stored)
        # The highest place of a normal image is, on average, at the reference.
        maps, *_ = evaluate.predict(model, variables | {"prototypes": stored}, images, mesh)
        highest = maps.max(axis=(1, 2)).astype(np.float64)
        assert np.mean(highest / (1 - highest)) == pytest.approx(1, rel=1e-3)
    both, closer = found[0, 1], found[0, 1].pop("closer_0")
    assert closer["patch_map"] == both["patch_map"]
    for own, alone in ((both, found[(0,)]), (closer, found[(1,)])):
        np.testing.assert_allclose(own["scale_2"]["maps"], alone["scale_2"]["maps"], atol=1e-5)
        np.testing.assert_array_equal(own["memory_2"]["patches"], alone["memory_2"]["patches"])


def test_what_stands_beside_a_trained_network_is_what_there_is_without_training(caplog):
    tiny.register()
    config = default.get_config()
    config.update_from_flattened_dict(tiny.FIELDS)
    config.seed, config.memory.patches, config.patch_map.patches = 3, 5, 5
    config.prototypes.max_images = 3
    config.patch_map.backbone.name, config.patch_map.backbone.weights = "tiny", "random"
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    mesh = meshes.create_mesh(jax.devices()[:1])

    def fit(steps, weight):
        config.total_steps, config.patch_map.weight = steps, weight
        model = train.create_model(config, 2)
        variables = meshes.replicate(mesh, train.create_variables(config, model))
        stored = fitting.fit_prototypes(config, model, variables, images, mesh)
        return jax.tree.map(np.asarray, (variables, stored))

    with caplog.at_level(logging.INFO):
        variables, stored = fit(9, 0.5)
    assert caplog.text.count("prototypes are made of 3 of the 4") == 1
    (_, plain), (alone, untrained) = fit(9, 0.0), fit(0, 0.0)
    beside = stored.pop("beside")
    jax.tree.map(np.testing.assert_array_equal, stored, plain)
    del untrained["whole"]
    jax.tree.map(np.testing.assert_array_equal, beside, untrained)
    assert beside["patch_map"]["reference"] != 1
    jax.tree.map(
        np.testing.assert_array_equal,
        variables["backbone"]["beside"]["backbone"],
        alone["backbone"]["backbone"],
    )


@pytest.mark.parametrize("count", [0, 3])
def test_seen_anomalies_tell_how_far_the_distance_counts(count):
    tiny.register()
    config = default.get_config()
    config.update_from_flattened_dict(tiny.FIELDS | {"score_distance": 0.5})
    rng = np.random.default_rng(0)
    images = rng.integers(100, 140, (12, 64, 64, 3)).astype(np.uint8)
    seen = rng.integers(0, 256, (count, 64, 64, 3)).astype(np.uint8)
    mesh = meshes.create_mesh(jax.devices()[:2])
    model = train.create_model(config, 2)
    variables = meshes.replicate(mesh, train.create_variables(config, model))
    stored = fitting.fit_prototypes(config, model, variables, images, mesh, seen)
    stored["interest"] = {"mask": meshes.replicate(mesh, np.ones((64, 64), np.uint8))}
    *_, distances = evaluate.predict(model, variables | {"prototypes": stored}, images, mesh)
    low, high = np.quantile(np.log(distances + 0.1), (0.16, 0.84))
    # Noise of another range is farther than every normal image.
    expected = 0.5 / ((high - low) / 2) if count else 0
    assert stored["whole"]["exponent"] == pytest.approx(expected, rel=1e-4)
