"""Multi-scale fusion (MSF, Fig. 3): each scale receives the sum of all scales, HRNet style.

The paper fuses features and residuals "separately", by blocks of their own, and fuses once more
after the attention. As in PRNet there is no normalisation and no ReLU inside, only a sum; but its
convs that bring a map down are grouped, one of 5x5 with stride 4 for two halvings, where a chain of
whole ones is HRNet's. Upsampling is by half pixels; PRNet's aligns the corners.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from prn_jax.models.layers import Dtype, conv1x1, upsample


class MultiScaleFusion(nn.Module):
    """Full exchange between scales, each half as large as the one before it.

    A coarser map is brought up by a 1x1 conv and bilinear upsampling, in this order because the
    two commute and the conv is cheaper at the lower resolution. A finer map is brought down by a
    chain of 3x3 convs of stride 2, one per halving, as in HRNet.

    Attributes:
      dtype: compute type.
      unfused: see `layers.upsample`.
    """

    dtype: Dtype = jnp.float32
    unfused: bool = False

    @nn.compact
    def __call__(self, maps: tuple[Float[Array, "..."], ...]) -> tuple[Float[Array, "..."], ...]:
        """Fuses maps [b, h / 2**i, w / 2**i, c_i] into maps of the same shapes."""
        return tuple(
            sum(self._bring(x, source, target, maps[target].shape[-1])
                for source, x in enumerate(maps))
            for target in range(len(maps))
        )  # fmt: skip

    def _bring(self, x: Array, source: int, target: int, channels: int) -> Array:
        name = f"scale{source + 1}_to_{target + 1}"
        if source == target:
            return x
        if source > target:
            x = conv1x1(channels, self.dtype, name)(x)
            return upsample(x, source - target, self.unfused)
        for halving in range(1, target - source + 1):
            width = channels if halving == target - source else x.shape[-1]
            x = nn.Conv(
                width, (3, 3), (2, 2), padding=1, dtype=self.dtype, name=f"{name}_{halving}"
            )(x)
        return x
