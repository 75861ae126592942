"""Multi-size self-attention (MSA, Fig. 3): attention among patches of several sizes.

Fig. 3 cuts the map into patches of several sizes, gives each size its own self-attention, merges
them by a conv, and repeats the whole N times; it does not show how a patch becomes a query, key and
value. That follows STTN: 1x1 convs on the map before it is cut, the channels shared out over the
sizes, logits scaled by 1/sqrt(d), LeakyReLU and a skip connection around the whole. Its
feed-forward convs, which Fig. 3 does not show, are left out. PRNet gives each size all channels, an
elementwise scale and bias for a projection, logits scaled by 1/d, and no skip but one of a conv of
its heads.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prn_jax.models.layers import Dtype, batch_norm, conv1x1


class MultiSizeAttention(nn.Module):
    """One layer: attention per patch size, a 3x3 conv that merges them, and a skip connection.

    Attributes:
      divisions: the map is cut into d x d patches for each d. Each owns an equal share of the
        channels (the first ones take what does not divide).
      norm: the conv that merges has one, see `layers.batch_norm`.
      dtype: compute type; the softmax is float32.
    """

    divisions: tuple[int, ...] = (1, 2, 4, 8)
    norm: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        shares = _shares(channels, len(self.divisions))
        # A single patch attends to itself with weight 1 whatever its query and key are: it gets
        # neither, instead of parameters without a gradient.
        paired = [0 if d == 1 else share for d, share in zip(self.divisions, shares)]
        projected = conv1x1(channels + 2 * sum(paired), self.dtype, "qkv")(x)
        # A split is differentiated as one concatenation, slices as a sum of padded parts.
        parts = jax.lax.split(projected, (*shares, *paired, *paired), axis=-1)
        count = len(shares)
        values, queries, keys = parts[:count], parts[count : 2 * count], parts[2 * count :]
        heads = [
            v if d == 1 else attend(q, k, v, d)
            for d, q, k, v in zip(self.divisions, queries, keys, values)
        ]
        merge = nn.Conv(channels, (3, 3), use_bias=not self.norm, dtype=self.dtype, name="merge")
        merged = merge(jnp.concatenate(heads, axis=-1))
        if self.norm:
            merged = batch_norm(train, self.dtype)(merged)
        return x + nn.leaky_relu(merged, 0.2)


def attend(
    query: Float[Array, "b h w c"],
    key: Float[Array, "b h w c"],
    value: Float[Array, "b h w c"],
    divisions: int,
) -> Float[Array, "b h w c"]:
    """Self-attention among `divisions` x `divisions` patches of a map.

    A map that does not divide is padded with zeros at the bottom and the right to whole patches;
    there are then as many patches as hold any of the map, and the padding is cut off again.
    """
    height, width = value.shape[1:3]
    patch = (math.ceil(height / divisions), math.ceil(width / divisions))
    tokens = [_to_patches(x, patch) for x in (query, key, value)]
    scale = 1.0 / math.sqrt(tokens[0].shape[-1])
    logits = jnp.einsum("bqd,bkd->bqk", tokens[0], tokens[1], preferred_element_type=jnp.float32)
    # Before they are scaled: compiled as one, the softmax of 1e9 and more would have no gradient.
    logits -= jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jax.nn.softmax(logits * scale, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bqk,bkd->bqd", weights, tokens[2])
    return _from_patches(mixed, patch, value.shape)


def _to_patches(x: Array, patch: tuple[int, int]) -> Array:
    """Cuts [b, h, w, c] into [b, patches, patch pixels * c]."""
    batch, height, width, channels = x.shape
    rows, columns = math.ceil(height / patch[0]), math.ceil(width / patch[1])
    padding = (rows * patch[0] - height, columns * patch[1] - width)
    x = jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)))
    x = x.reshape(batch, rows, patch[0], columns, patch[1], channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def _from_patches(x: Array, patch: tuple[int, int], shape: tuple) -> Array:
    """Undoes `_to_patches` for maps of the given shape."""
    batch, height, width, channels = shape
    rows, columns = math.ceil(height / patch[0]), math.ceil(width / patch[1])
    x = x.reshape(batch, rows, columns, patch[0], patch[1], channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * patch[0], columns * patch[1], -1)
    return x[:, :height, :width]


def _shares(channels: int, groups: int) -> list[int]:
    return [channels // groups + (i < channels % groups) for i in range(groups)]
