import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prn_jax.models import attention


def plain(query, key, value, divisions):
    """The same attention in float64, patch by patch; the map divides evenly."""
    batch, height, width, channels = value.shape
    rows, columns = height // divisions, width // divisions
    boxes = [
        (slice(r, r + rows), slice(c, c + columns))
        for r in range(0, height, rows)
        for c in range(0, width, columns)
    ]
    out = np.zeros_like(value, np.float64)
    for b in range(batch):
        for box in boxes:
            logits = np.array([np.vdot(query[b][box], key[b][other]) for other in boxes])
            weights = np.exp(logits / np.sqrt(rows * columns * channels))
            weights /= weights.sum()
            out[b][box] = sum(w * value[b][other] for w, other in zip(weights, boxes))
    return out


@pytest.mark.parametrize("divisions", [1, 2, 4])
def test_attend_equals_plain_attention(divisions):
    rng = np.random.default_rng(divisions)
    q, k, v = rng.normal(size=(3, 2, 8, 12, 3))
    expected = plain(q, k, v, divisions)
    np.testing.assert_allclose(
        attention.attend(*(jnp.float32(x) for x in (q, k, v)), divisions), expected, atol=1e-5
    )


def test_attention_to_large_maps_has_a_gradient():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 16, 16, 128)).astype(np.float32)
    q, k = -1e4 * np.abs(q), 1e4 * np.abs(k)  # logits of -6e9

    def total(q, k, v):
        return jnp.sum(jnp.square(attention.attend(q, k, v, 2)))

    # Each patch attends to one alone: nothing but the values matters, and these squared (Euler).
    *others, of_values = jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)
    assert not np.any(others)
    expected = 2.0 * jax.jit(total)(q, k, v)
    np.testing.assert_allclose(np.sum(of_values * v), expected, rtol=1e-4)


def test_a_map_that_does_not_divide_is_padded():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 7, 5, 2)).astype(np.float32)
    padding = ((0, 0), (0, 1), (0, 1), (0, 0))
    padded = [np.pad(x, padding) for x in (q, k, v)]
    # 7x5 with 4 divisions: patches of 2x2, hence 4x3 of them, the padded map 8x6.
    boxes = [(slice(r, r + 2), slice(c, c + 2)) for r in range(0, 8, 2) for c in range(0, 6, 2)]
    out = np.zeros_like(padded[2])
    for box in boxes:
        logits = np.array([np.vdot(padded[0][0][box], padded[1][0][o]) for o in boxes])
        weights = np.exp(logits / np.sqrt(8))
        out[0][box] = sum(w * padded[2][0][o] for w, o in zip(weights / weights.sum(), boxes))
    np.testing.assert_allclose(
        attention.attend(*map(jnp.asarray, (q, k, v)), 4), out[:, :7, :5], atol=1e-5
    )


@pytest.mark.parametrize("divisions", [(1, 2, 4, 8), (2, 4), (1, 2, 4)])
def test_every_parameter_gets_a_gradient(divisions):
    layer = attention.MultiSizeAttention(divisions)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 10))
    variables = layer.init(jax.random.key(1), x, train=False)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(jnp.square(layer.apply(v, x, False)))))(variables)
    for leaf in jax.tree.leaves(gradient):
        # Each output channel of each conv: no projection is dead (a key's bias shifts all logits
        # of a query alike, so it is left out).
        if leaf.ndim == 4:
            assert np.all(np.abs(leaf).sum(axis=(0, 1, 2)) > 0)
    assert layer.apply(variables, x, train=False).shape == x.shape


@pytest.mark.parametrize("norm", [False, True])
def test_a_layer_is_attention_by_size_a_conv_and_a_skip(norm):
    layer = attention.MultiSizeAttention((1, 2, 4), norm)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 7))
    variables = layer.init(jax.random.key(1), jnp.float32(x), train=False)
    qkv, merge = (variables["params"][name] for name in ("qkv", "merge"))
    # 7 channels are shared out as 3, 2 and 2; the size of one patch has values alone.
    projected = x @ np.float64(qkv["kernel"][0, 0]) + np.float64(qkv["bias"])
    values, queries, keys = np.split(projected, [7, 11], axis=-1)
    heads = [values[..., :3]] + [
        plain(queries[..., a - 3 : a - 1], keys[..., a - 3 : a - 1], values[..., a : a + 2], d)
        for a, d in ((3, 2), (5, 4))
    ]
    padded = np.pad(np.concatenate(heads, axis=-1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.float64(merge["kernel"])
    merged = sum(padded[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3))
    if norm:  # by the batch
        merged -= merged.mean(axis=(0, 1, 2))
        merged /= np.sqrt(merged.var(axis=(0, 1, 2)) + 1e-5)
    else:
        merged += np.float64(merge["bias"])
    expected = x + np.where(merged > 0, merged, 0.2 * merged)

    def train(images):
        return layer.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    found = jax.vmap(train, axis_name="data")(jnp.float32(x)[None])[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
