import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prn_jax import losses


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(2, 8, 9))
    return logits, (rng.random((2, 8, 9)) < 0.3).astype(np.float64)


def test_smooth_l1_equals_the_formula(batch):
    logits, mask = batch
    error = np.abs(1 / (1 + np.exp(-logits)) - mask)
    expected = np.where(error < 1, 0.5 * error**2, error - 0.5).mean()
    assert losses.smooth_l1(*map(jnp.float32, batch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 4.0), (0.25, 2.0), (0.9, 0.0)])
def test_focal_equals_the_formula(batch, alpha, gamma):
    logits, mask = batch
    p = 1 / (1 + np.exp(-logits))
    truth = np.where(mask == 1, p, 1 - p)
    weight = np.where(mask == 1, alpha, 1 - alpha)
    expected = (-weight * (1 - truth) ** gamma * np.log(truth)).mean()
    ours = losses.focal(*map(jnp.float32, batch), alpha, gamma)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_dice_equals_the_formula(batch):
    logits, mask = batch
    p = 1 / (1 + np.exp(-logits))
    expected = 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
    assert losses.dice(*map(jnp.float32, batch)) == pytest.approx(expected, rel=1e-5)


def test_extreme_logits_give_finite_losses_and_gradients():
    logits = jnp.array([[[-1e4, 1e4, -90.0, 90.0]]])
    mask = jnp.array([[[1.0, 0.0, 1.0, 0.0]]])
    for loss in (losses.smooth_l1, losses.focal, losses.dice):
        value, gradient = jax.value_and_grad(loss)(logits, mask)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))
