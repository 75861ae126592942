"""Twenty steps on 1, 2, 4 and 8 devices, fifty in bfloat16: what may differ, how much."""

import jax
import numpy as np
import pytest
from scipy import stats

from configs import default
from prn_jax import evaluate, metrics, train
from prn_jax import mesh as meshes
from prn_jax.checkpoints import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("scale")]


def make_images(seed, count):
    """A rough surface; three of four pictures have a brighter patch, from faint to plain."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 110, (count, 64, 64, 1)).repeat(3, -1)
    mask = np.zeros((count, 64, 64), np.uint8)
    for i in range(count):
        if i % 4:
            row, column, side = rng.integers(0, 40), rng.integers(0, 40), rng.integers(8, 24)
            mask[i, row : row + side, column : column + side] = 1
            image[i] += (mask[i] * rng.integers(15, 100))[..., None]
    return image.astype(np.uint8), mask


def run(folder, devices, steps, **changes):
    """Trains, then evaluates on 21 pictures, which no number of devices divides but 1."""
    config = default.get_config()
    config.image_size = (64, 64)
    config.batch_size = 8
    config.total_steps = steps
    config.log_every = 1
    config.attention.layers = 1
    config.backbone.weights = "random"
    config.prototypes.iterations = 5
    config.optimizer.learning_rate = 1e-4
    config.checkpoint.every_steps = 0
    config.dtype = "float32"
    config.update_from_flattened_dict(changes)
    losses = {}

    def batches(start, stop):
        for step in range(start, stop):
            image, mask = make_images(step, config.batch_size)
            yield {"image": image, "mask": mask}

    mesh = meshes.create_mesh(jax.devices()[:devices])
    checkpoints = Checkpoints(folder)
    normal = make_images(1000, 84)[0][::4]
    try:
        trained = train.train(
            config, normal, batches, checkpoints, mesh,
            write_scalars=lambda step, scalars: losses.update({step: scalars["loss"]}),
        )  # fmt: skip
    finally:
        checkpoints.close()
    image, mask = make_images(2000, 21)
    maps, scores = evaluate.predict(trained.model, trained.variables, image, mesh, batch_size=8)
    found = metrics.evaluate_maps(maps, mask, scores, mask.any((1, 2)).astype(int))
    prototypes = jax.device_get(trained.variables["prototypes"])
    return prototypes, np.array([losses[step] for step in sorted(losses)]), scores, found


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), 1, 20)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_twenty_steps_do_not_depend_on_the_devices(devices, one, tmp_path):
    prototypes, losses, scores, found = run(tmp_path, devices, 20)
    for a, b in zip(jax.tree.leaves(prototypes), jax.tree.leaves(one[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # Rounding differs, and Adam's first steps are signs: it grows slowly.
    np.testing.assert_allclose(losses[:5], one[1][:5], rtol=5e-4)
    np.testing.assert_allclose(losses, one[1], rtol=2e-2)
    np.testing.assert_allclose(scores, one[2], atol=2e-2)
    for name, value in found.items():
        assert value == pytest.approx(one[3][name], abs=2e-2), name


def test_fifty_steps_in_bfloat16_follow_those_in_float32(tmp_path):
    _, exact, exact_scores, _ = run(tmp_path / "float32", 1, 50)
    _, losses, scores, _ = run(tmp_path / "bfloat16", 1, 50, dtype="bfloat16")
    assert np.abs(losses / exact - 1).mean() <= 1e-2
    assert stats.spearmanr(scores, exact_scores).statistic >= 0.97
