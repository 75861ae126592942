"""The decoder (the right of Fig. 3): from stage 4 up to one logit per pixel.

UNet-like: stage 4 is brought up level by level, joined with the fused map of each scale, and at
last brought to the size of the image. Fig. 3 shows the levels; the convs follow PRNet, but that its
3x3 conv with norm and ReLU after each doubling is a 1x1 conv before it here, a thirty-sixth of the
work, and that its last step, which brings up by four at once (as Fig. 3), is two doublings that
narrow the channels, so that full resolution costs little. Bilinear upsampling is by half pixels;
PRNet's aligns the corners.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from prn_jax.models.layers import ConvNormReLU, Dtype, conv1x1, upsample


class Decoder(nn.Module):
    """Stage 4 and the fused maps -> logits at the size of the image.

    Attributes:
      channels: width of the levels at strides 4, 8 and 16.
      stride: of the finest level, 1, 2 or 4; its logits are brought up to the image's size.
      dtype: compute type; the logits are float32.
      unfused: see `layers.upsample`.
    """

    channels: tuple[int, ...] = (64, 128, 256)
    stride: int = 1
    dtype: Dtype = jnp.float32
    unfused: bool = False

    @nn.compact
    def __call__(
        self,
        deepest: Float[Array, "b h w c"],
        fused: tuple[Float[Array, "..."], ...],
        stem: Float[Array, "b h2 w2 c2"] | None,
        train: bool,
    ) -> Float[Array, "b height width"]:
        """Decodes.

        Args:
          deepest: stage 4 of the backbone, stride 32.
          fused: the maps of the last fusion, strides 4, 8, 16.
          stem: what enters the backbone's stage 1, stride 2, if fine detail is to come in there.
          train: batch statistics (True) or running ones.

        Returns:
          Logits [b, 32 * h, 32 * w], float32.
        """
        x = deepest
        for width, skip in zip(reversed(self.channels), reversed(fused)):
            x = upsample(conv1x1(width, self.dtype)(x), 1, self.unfused)
            x = jnp.concatenate([x, skip.astype(x.dtype)], axis=-1)
            x = ConvNormReLU(width, self.dtype)(x, train)
            x = ConvNormReLU(width, self.dtype)(x, train)
        finer = {4: 0, 2: 1, 1: 2}[self.stride]
        levels = (self.channels[0] // 2, stem), (self.channels[0] // 4, None)
        for width, skip in levels[:finer]:
            x = upsample(conv1x1(width, self.dtype)(x), 1, self.unfused)
            if skip is not None:
                skip = conv1x1(width, self.dtype, "stem")(skip.astype(x.dtype))
                x = jnp.concatenate([x, skip], axis=-1)
            x = ConvNormReLU(width, self.dtype)(x, train)
        logit = nn.Conv(1, (3, 3), dtype=jnp.float32, name="logit")(x)
        return upsample(logit, 2 - finer, self.unfused)[..., 0]
