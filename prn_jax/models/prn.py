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
from prn_jax.models.layers import Dtype, conv1x1
from prn_jax.models.memory import PatchMap, PatchResidual, window_residuals
from prn_jax.models.prototypes import PrototypeResidual, Relative

SCALES = 3  # stages 1 to 3, at strides 4, 8, 16, have prototypes


class PRN(nn.Module):
    """Prototypical residual network: uint8 images -> one anomaly logit per pixel.

    Variable collections: `params` (trained), `batch_stats` (the decoder's), `backbone` (frozen
    stages), `prototypes` (`scale_i/maps`, [k, h, w, c], `memory_i/patches`, [m, c], and
    `relative_i_j/mean`, [c], for residual j of scale i; float32).

    Attributes:
      backbone_name: a key of `BACKBONES`.
      train_stage4: stage 4 is trained (its variables are `params`) or frozen.
      num_prototypes: k, the same for each scale.
      attention_layers: N of Fig. 3.
      divisions: see `MultiSizeAttention`.
      use_prototypes: the residuals of whole maps are an input.
      use_relative: residuals are in multiples of what normal images have.
      use_fusion: scales are fused; otherwise each goes its own way to the decoder.
      num_patches: m of each scale of `memory_scales`; 0: no memory of patches.
      memory_scales: scales with a memory, counted from 1.
      window: see `window_residuals`; 0: none.
      use_stem: the decoder sees what enters stage 1, at stride 2.
      trained: False where nothing is trained: the logits come of the distance to the memory alone.
      dtype: compute type; parameters, statistics, distances and logits are float32.
    """

    backbone_name: str = "resnet18"
    train_stage4: bool = True
    num_prototypes: int = 1
    attention_layers: int = 3
    divisions: tuple[int, ...] = (1, 2, 4, 8)
    use_prototypes: bool = True
    use_relative: bool = False
    use_fusion: bool = True
    num_patches: int = 0
    memory_scales: tuple[int, ...] = (1, 2, 3)
    window: int = 0
    use_stem: bool = False
    trained: bool = True
    dtype: Dtype = jnp.float32

    def setup(self):
        self.backbone = create_backbone(
            self.backbone_name, self.train_stage4, self.dtype, return_stem=True
        )
        self.scale = [PrototypeResidual(self.num_prototypes) for _ in range(SCALES)]
        self.memory = [PatchResidual(self.num_patches) for _ in range(SCALES)]
        self.patch_map = PatchMap()
        self.relative = [[Relative() for _ in range(3)] for _ in range(SCALES)]
        self.join = [conv1x1(x, self.dtype) for x in self._channels()]
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
        stem, *features, deepest = self._stages(image)
        found = [self._residuals(scale, x) for scale, x in enumerate(features)]
        if not self.trained:
            strides = tuple(scale + 1 for scale in self.memory_scales)
            return self.patch_map(tuple(found[x - 1][-1] for x in self.memory_scales), strides)
        maps = self._fuse(self.fuse_features, features)
        if self.use_relative:
            found = [[f(x) for f, x in zip(*both)] for both in zip(self.relative, found)]
        if found[0]:
            residuals = self._fuse(self.fuse_residuals, [self._join(*x) for x in enumerate(found)])
            maps = tuple(jnp.concatenate(pair, axis=-1) for pair in zip(maps, residuals))
        maps = list(maps)
        for scale, layers in enumerate(self.attention):
            for layer in layers:
                maps[scale] = layer(maps[scale])
        maps = self._fuse(self.fuse_attended, maps)
        return self.decoder(deepest, maps, stem if self.use_stem else None, train)

    def _residuals(self, scale: int, features: Array) -> list[Array]:
        """A scale's residuals, float32: of whole maps, of a window, of the memory."""
        whole = self.scale[scale]
        found = [whole(features)] if self.use_prototypes else []
        if not self.use_prototypes or self.window:
            maps = whole.maps(features)
        if self.window:
            found.append(window_residuals(features, maps, self.window))
        if self.num_patches and scale + 1 in self.memory_scales:
            found.append(self.memory[scale](features))
        return found

    def _join(self, scale: int, residuals: list[Array]) -> Array:
        """Several residuals become one with as many channels: the rest of the network stays."""
        joined = jnp.concatenate(residuals, axis=-1).astype(self.dtype)
        return joined if len(residuals) == 1 else self.join[scale](joined)

    def _fuse(self, fuse: MultiScaleFusion, maps: list[Array]) -> tuple[Array, ...]:
        return fuse(tuple(maps)) if self.use_fusion else tuple(maps)

    def _channels(self) -> tuple[int, ...]:
        return BACKBONES[self.backbone_name].channels[:SCALES]

    def features(
        self, image: UInt8[Array, "b height width 3"]
    ) -> tuple[Float[Array, "b h w c"], ...]:
        """The frozen feature maps at strides 4, 8, 16, float32: what prototypes are made of."""
        return tuple(x.astype(jnp.float32) for x in self._stages(image)[1:-1])

    def mean_residuals(
        self, image: UInt8[Array, "b height width 3"]
    ) -> list[list[Float[Array, "b c"]]]:
        """Per scale, each residual's mean over an image's places, before `Relative`."""
        found = [self._residuals(*x) for x in enumerate(self._stages(image)[1:-1])]
        return jax.tree.map(lambda x: jnp.mean(x, axis=(1, 2)), found)

    def _stages(self, image: Array) -> tuple[Array, ...]:
        """What enters stage 1, and the four stages' maps: strides 2, 4, 8, 16, 32."""
        spec = BACKBONES[self.backbone_name]
        normalised = (image.astype(jnp.float32) - jnp.array(spec.mean)) / jnp.array(spec.std)
        return tuple(spec.gain * x for x in self.backbone(normalised.astype(self.dtype)))


def compute_dtype(config: ConfigDict) -> Dtype:
    """The type named by `config.dtype`; `auto` is bfloat16 but on CPU."""
    if config.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.dtype).type


def create_model(config: ConfigDict, num_prototypes: int) -> PRN:
    """The network of a configuration (see configs/default.py), of an earlier version's too."""
    memory = config.get("memory", {})
    # Before there was a memory, no steps meant as many as `epochs` says.
    trained = config.total_steps != 0 or not memory
    return PRN(
        backbone_name=config.backbone.name,
        train_stage4=config.backbone.train_stage4,
        # Without training no whole map is compared with; a checkpoint keeps its form.
        num_prototypes=num_prototypes if trained else 1,
        attention_layers=config.attention.layers,
        divisions=tuple(config.attention.divisions),
        use_prototypes=config.prototypes.get("enabled", True),
        use_relative=trained and config.prototypes.get("relative", False),
        use_stem=config.get("decoder", {}).get("stem", False),
        use_fusion=config.get("fusion", {}).get("enabled", True),
        num_patches=memory.get("patches", 0),
        memory_scales=tuple(memory.get("scales", (1, 2, 3))),
        window=memory.get("window", 0),
        trained=trained,
        dtype=compute_dtype(config),
    )
