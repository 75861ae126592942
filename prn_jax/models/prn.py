"""PRN, assembled as the paper's Fig. 3 draws it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from prn_jax.models.attention import MultiSizeAttention
from prn_jax.models.backbone import BACKBONES, create_backbone
from prn_jax.models.decoder import Decoder
from prn_jax.models.fusion import MultiScaleFusion
from prn_jax.models.layers import Dtype
from prn_jax.models.prototypes import PrototypeResidual

SCALES = 3  # stages 1 to 3, at strides 4, 8, 16, have prototypes


class PRN(nn.Module):
    """Prototypical residual network: uint8 images -> one anomaly logit per pixel.

    Variable collections: `params` (trained), `batch_stats` (the decoder's), `backbone` (frozen
    stages), `prototypes` (`scale_i/maps`, [k, h, w, c], float32).

    Attributes:
      backbone_name: a key of `BACKBONES`.
      train_stage4: stage 4 is trained (its variables are `params`) or frozen.
      num_prototypes: k, the same for each scale.
      attention_layers: N of Fig. 3.
      divisions: see `MultiSizeAttention`.
      dtype: compute type; parameters, statistics, distances and logits are float32.
    """

    backbone_name: str = "resnet18"
    train_stage4: bool = True
    num_prototypes: int = 1
    attention_layers: int = 3
    divisions: tuple[int, ...] = (1, 2, 4, 8)
    dtype: Dtype = jnp.float32

    def setup(self):
        self.backbone = create_backbone(self.backbone_name, self.train_stage4, self.dtype)
        self.scale = [PrototypeResidual(self.num_prototypes) for _ in range(SCALES)]
        self.fuse_features = MultiScaleFusion(self.dtype)
        self.fuse_residuals = MultiScaleFusion(self.dtype)
        self.attention = [
            [MultiSizeAttention(self.divisions, self.dtype) for _ in range(self.attention_layers)]
            for _ in range(SCALES)
        ]
        self.fuse_attended = MultiScaleFusion(self.dtype)
        self.decoder = Decoder(dtype=self.dtype)

    def __call__(
        self, image: UInt8[Array, "b height width 3"], train: bool = False
    ) -> Float[Array, "b height width"]:
        """Logits of a batch of images; height and width are divisible by 32."""
        *features, deepest = self._stages(image)
        residuals = [match(x) for match, x in zip(self.scale, features)]
        features = self.fuse_features(tuple(features))
        residuals = self.fuse_residuals(tuple(x.astype(self.dtype) for x in residuals))
        maps = [jnp.concatenate(pair, axis=-1) for pair in zip(features, residuals)]
        for scale, layers in enumerate(self.attention):
            for layer in layers:
                maps[scale] = layer(maps[scale])
        return self.decoder(deepest, self.fuse_attended(tuple(maps)), train)

    def features(
        self, image: UInt8[Array, "b height width 3"]
    ) -> tuple[Float[Array, "b h w c"], ...]:
        """The frozen feature maps at strides 4, 8, 16, float32: what prototypes are made of."""
        return tuple(x.astype(jnp.float32) for x in self._stages(image)[:SCALES])

    def _stages(self, image: Array) -> tuple[Array, ...]:
        spec = BACKBONES[self.backbone_name]
        normalised = (image.astype(jnp.float32) - jnp.array(spec.mean)) / jnp.array(spec.std)
        return tuple(spec.gain * x for x in self.backbone(normalised.astype(self.dtype)))


def compute_dtype(config: ConfigDict) -> Dtype:
    """The type named by `config.dtype`; `auto` is bfloat16 but on CPU."""
    if config.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.dtype).type


def create_model(config: ConfigDict, num_prototypes: int) -> PRN:
    """The network of a configuration (see configs/default.py)."""
    return PRN(
        backbone_name=config.backbone.name,
        train_stage4=config.backbone.train_stage4,
        num_prototypes=num_prototypes,
        attention_layers=config.attention.layers,
        divisions=tuple(config.attention.divisions),
        dtype=compute_dtype(config),
    )
