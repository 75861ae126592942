"""PRN, assembled as the paper's Fig. 3 draws it."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from prn_jax.fields import looks
from prn_jax.models.attention import MultiSizeAttention
from prn_jax.models.backbone import BACKBONES, backbone_spec, create_backbone
from prn_jax.models.decoder import Decoder
from prn_jax.models.fusion import MultiScaleFusion
from prn_jax.models.layers import Dtype, conv1x1, resized
from prn_jax.models.memory import PatchMap, PatchResidual, window_residuals
from prn_jax.models.prototypes import PrototypeResidual
from prn_jax.models.whole import OUTSIDE, RegionOfInterest, WholeImage, describe
from prn_jax.tiles import Tiling

SCALES = 3  # stages 1 to 3, at strides 4, 8, 16, have prototypes


def _exact(method: Callable) -> Callable:
    """Products and convs of float32 stay that: a TPU would round to bfloat16, a GPU to TF32.

    Those of smaller types are not concerned.
    """

    @functools.wraps(method)
    def exact(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return method(*args, **kwargs)

    return exact


class PRN(nn.Module):
    """Prototypical residual network: uint8 images -> one anomaly logit per pixel.

    Variable collections: `params` (trained), `batch_stats` (of batch norms), `backbone` (frozen
    stages), `prototypes` (`scale_i/maps`, [k, h, w, c], `memory_i/patches`, [m, c], untrained
    `patch_map/reference`, and those of `whole.py`: `interest/mask`, `whole/centres`,
    `whole/spread` and, with `score_distance`, `whole/exponent`). What comes after the backbone
    is there once more for each further look, in `closer_i`; what a patch map beside the network
    has of `backbone` and `prototypes` is in `beside`.

    Attributes:
      backbone_name: a key of `BACKBONES`.
      stages: that it has; without training 3 do.
      train_stage4: stage 4 is trained (its variables are `params`) or frozen.
      doublings: of each look, how many times the image is doubled before the backbone, for finer
        maps; below 0: halved. The looks share the backbone.
      merge: of several looks, "mean": the logits are the mean of theirs; "max": each learns by
        itself, and the highest counts.
      num_prototypes: k, the same for each scale; of tiles, those of all places.
      attention_layers: N of Fig. 3.
      attention_scales: scales that have them, counted from 1.
      divisions: see `MultiSizeAttention`.
      attention_norm: see `MultiSizeAttention`.
      use_prototypes: the residuals of whole maps are an input.
      use_fusion: scales are fused; otherwise each goes its own way to the decoder.
      num_patches: m of each scale of `memory_scales`; 0: no memory of patches.
      memory_scales: scales with a memory, counted from 1.
      window: see `window_residuals`; 0: none.
      use_stem: the decoder sees what enters stage 1, at stride 2.
      decoder_channels: width of the decoder's levels at strides 4, 8 and 16.
      decoder_stride: of its finest level.
      num_centres: of `WholeImage`.
      score_distance: how many logits of an image's score a standard deviation of the logarithm of
        its distance is worth at most, see `whole.exponent`; 0: none.
      trained: False where nothing is trained: the logits come of the distance to the memory alone.
      beside_name: a key of `BACKBONES`: `beside_weight` times the untrained logits of a network
        with that one, of the image as it is, is added to what is trained; "": none.
      beside_weight: see there.
      beside_patches: of that network, `num_patches`.
      tiling: of the images whose tiles it sees; None: it sees whole images. The region of interest
        is that of the whole image: what a tile has of it, `mask` says.
      turns: quarter turns against the clock, and whether left and right are swapped then: the
        logits are the mean of the image's, turned in each of these ways, turned back. Not in
        training. The first changes nothing.
      unfused: for a runtime that fuses no operators: see `layers.upsample`; depthwise convs are
        grouped ones then, see `backbone.Conv`.
      dtype: compute type; parameters, statistics, distances and logits are float32.
    """

    backbone_name: str = "resnet18"
    stages: int = 4
    train_stage4: bool = True
    doublings: tuple[int, ...] = (0,)
    merge: str = "mean"
    num_prototypes: int = 1
    attention_layers: int = 3
    attention_scales: tuple[int, ...] = (1, 2, 3)
    divisions: tuple[int, ...] = (1, 2, 4, 8)
    attention_norm: bool = False
    use_prototypes: bool = True
    use_fusion: bool = True
    num_patches: int = 0
    memory_scales: tuple[int, ...] = (1, 2, 3)
    window: int = 0
    use_stem: bool = False
    decoder_channels: tuple[int, ...] = Decoder.channels
    decoder_stride: int = 1
    num_centres: int = 1
    score_distance: float = 0.0
    trained: bool = True
    beside_name: str = ""
    beside_weight: float = 0.0
    beside_patches: int = 1024
    tiling: Tiling | None = None
    turns: tuple[tuple[int, bool], ...] = ((0, False),)
    unfused: bool = False
    dtype: Dtype = jnp.float32

    def setup(self):
        self.backbone = create_backbone(
            self.backbone_name,
            self.train_stage4,
            self.dtype,
            return_stem=True,
            grouped=self.unfused,
            stages=self.stages,
        )
        self.scale = [PrototypeResidual(self.num_prototypes) for _ in range(SCALES)]
        self.memory = [PatchResidual(self.num_patches) for _ in range(SCALES)]
        self.patch_map = PatchMap(self.unfused)
        self.interest = RegionOfInterest()
        self.whole = WholeImage(self.num_centres, scores=bool(self.score_distance))
        self.join = [conv1x1(x, self.dtype) for x in self._channels()]
        self.fuse_features = MultiScaleFusion(self.dtype, self.unfused)
        self.fuse_residuals = MultiScaleFusion(self.dtype, self.unfused)
        self.attention = [
            [
                MultiSizeAttention(self.divisions, self.attention_norm, self.dtype)
                for _ in range(self.attention_layers * (scale + 1 in self.attention_scales))
            ]
            for scale in range(SCALES)
        ]
        self.fuse_attended = MultiScaleFusion(self.dtype, self.unfused)
        self.decoder = Decoder(self.decoder_channels, self.decoder_stride, self.dtype, self.unfused)
        self.closer = [
            self.clone(doublings=(times,), beside_name="") for times in self.doublings[1:]
        ]
        self.beside = untrained_beside(self) if self.beside_name else None

    def __call__(self, image: UInt8[Array, "b height width 3"]) -> Float[Array, "b height width"]:
        """Logits of a batch of images; each look's height and width are divisible by 32."""
        return self.inspect(image)[0]

    def learning(
        self, image: UInt8[Array, "b height width 3"]
    ) -> list[Float[Array, "b height width"]]:
        """In training: the logits, each of which has a loss, of images as they are."""
        mask = self._interest(image, None)
        each, _ = self._decode_each(image, train=True)
        learning = each if self.merge == "max" else [self._merged(each)]
        return [jnp.where(mask > 0, x, OUTSIDE) for x in learning]

    def inspect(
        self, image: UInt8[Array, "b height width 3"]
    ) -> tuple[Float[Array, "b height width"], Float[Array, " b"]]:
        """Logits, `OUTSIDE` where the image does not count, and `WholeImage`'s distances."""
        logits, descriptor = self.look(image)
        return logits, self.whole(descriptor)

    def look(
        self,
        image: UInt8[Array, "b height width 3"],
        mask: UInt8[Array, "b height width"] | None = None,
    ) -> tuple[Float[Array, "b height width"], Float[Array, "b d"]]:
        """Logits and descriptors of images, or of tiles that count where `mask` is 1."""
        mask = self._interest(image, mask)
        turns = self.turns[:1] if self.is_initializing() else self.turns
        each, features = self._decode_each(_turned(image, turns), train=False)
        found = self._merged(each)
        if len(turns) > 1:
            found = _mean_turned_back(found, turns)
            features = tuple(_apart(x, len(turns))[0] for x in features)
        if self.beside:
            (distance,), _ = self.beside._decode_each(image, train=False)
            found += self.beside_weight * distance
        return jnp.where(mask > 0, found, OUTSIDE), describe(image, features, mask)

    def distance(self, descriptor: Float[Array, "b d"]) -> Float[Array, " b"]:
        """`WholeImage`'s distances."""
        return self.whole(descriptor)

    def _interest(self, image: Array, mask: Array | None) -> Array:
        """Where images or tiles count; a tile whose place is not known counts everywhere."""
        if self.tiling is None:
            return self.interest(*image.shape[1:3])
        if self.is_initializing():
            self.interest(*self.tiling.size)
        return jnp.ones(image.shape[1:3], jnp.uint8) if mask is None else mask

    def _decode_each(self, image: Array, train: bool) -> tuple[list[Array], tuple[Array, ...]]:
        """Logits of each look, and the first one's frozen features."""
        looks = [self._stages(image, times) for times in self.doublings]
        each = [x.decode(stages, train) for x, stages in zip((self, *self.closer), looks)]
        return each, looks[0][1 : 1 + SCALES]

    def _merged(self, each: list[Array]) -> Array:
        return functools.reduce(jnp.maximum, each) if self.merge == "max" else sum(each) / len(each)

    @_exact
    def decode(self, stages: tuple[Array, ...], train: bool) -> Float[Array, "b height width"]:
        """Logits of one look's maps, see `_stages`: all that comes after the backbone."""
        stem, *features = stages[: 1 + SCALES]
        doublings = self.doublings[0]
        found = [self._residuals(scale, x) for scale, x in enumerate(features)]
        if not self.trained:
            strides = tuple(scale + 1 - doublings for scale in self.memory_scales)
            return self.patch_map(tuple(found[x - 1][-1] for x in self.memory_scales), strides)
        maps = self._fuse(self.fuse_features, features)
        if found[0]:
            residuals = self._fuse(self.fuse_residuals, [self._join(*x) for x in enumerate(found)])
            maps = tuple(jnp.concatenate(pair, axis=-1) for pair in zip(maps, residuals))
        maps = list(maps)
        for scale, layers in enumerate(self.attention):
            for layer in layers:
                maps[scale] = layer(maps[scale], train)
        maps = self._fuse(self.fuse_attended, maps)
        logits = self.decoder(stages[-1], maps, stem if self.use_stem else None, train)
        return resized(logits[..., None], -doublings, self.unfused)[..., 0]

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
        self, image: UInt8[Array, "b height width 3"], look: int = 0
    ) -> tuple[Float[Array, "b h w c"], ...]:
        """A look's frozen feature maps, float32: what prototypes are made of; see `_stages`."""
        stages = self._stages(image, self.doublings[look])
        return tuple(x.astype(jnp.float32) for x in stages[1 : 1 + SCALES])

    def descriptor(
        self,
        image: UInt8[Array, "b height width 3"],
        mask: UInt8[Array, "b height width"] | None = None,
    ) -> Float[Array, "b d"]:
        """What `WholeImage` compares: means over the image of colours and frozen features."""
        features = self._stages(image, self.doublings[0])[1 : 1 + SCALES]
        return describe(image, features, self._interest(image, mask))

    @property
    def kinds(self) -> tuple[int, ...]:
        """Entries of a descriptor that are of one kind: colours, then each scale's features."""
        return (3, *self._channels())

    @_exact
    def _stages(self, image: Array, doublings: int) -> tuple[Array, ...]:
        """What enters stage 1, and the stages' maps: strides 2, 4, 8, 16, 32 once resized."""
        spec = BACKBONES[self.backbone_name]
        normalised = (image.astype(jnp.float32) - jnp.array(spec.mean)) / jnp.array(spec.std)
        seen = resized(normalised.astype(self.dtype), doublings, self.unfused)
        return tuple(spec.gain * x for x in self.backbone(seen))


def untrained_beside(model: PRN) -> PRN:
    """The network whose distances to the nearest patches count beside those of a trained one."""
    return model.clone(
        backbone_name=model.beside_name,
        beside_name="",
        stages=SCALES,
        doublings=(0,),
        num_prototypes=1,
        num_patches=model.beside_patches,
        memory_scales=(1, 2, 3),
        use_prototypes=True,
        window=0,
        num_centres=1,
        score_distance=0.0,
        trained=False,
        turns=PRN.turns,
    )


def _turned(images: Array, turns: tuple[tuple[int, bool], ...]) -> Array:
    """Images [b, h, w, c] in each turn, mirrored then, as in `synthesis.pose`: [b * turns, ...].

    An image's turns are neighbours: some exports know no other batch of any size.
    """
    if len(turns) == 1:
        return images
    turned = []
    for quarters, mirrored in turns:
        x = jnp.rot90(images, quarters, (1, 2))
        turned.append(jnp.flip(x, 2) if mirrored else x)
    return jnp.stack(turned, axis=1).reshape(-1, *images.shape[1:])


def _mean_turned_back(maps: Array, turns: tuple[tuple[int, bool], ...]) -> Array:
    """The mean over an image's turns of their maps, turned back: [b, h, w]."""
    back = [
        jnp.rot90(jnp.flip(x, 2) if mirrored else x, -quarters, (1, 2))
        for x, (quarters, mirrored) in zip(_apart(maps, len(turns)), turns)
    ]
    return sum(back) / len(turns)


def _apart(joined: Array, parts: int) -> Array:
    """What was joined by `_turned`: [parts, b, ...], of any b."""
    return jnp.moveaxis(joined.reshape(-1, parts, *joined.shape[1:]), 1, 0)


def compute_dtype(config: ConfigDict) -> Dtype:
    """The type named by `config.dtype`; `auto` is bfloat16 where the device computes in it."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype).type
    # NVIDIA's before Ampere would convert around each conv; AMD's have names for a capability.
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    old = capability[:1].isdigit() and float(capability) < 8.0
    return jnp.float32 if old or jax.default_backend() == "cpu" else jnp.bfloat16


def create_model(
    config: ConfigDict, num_prototypes: int, turns: tuple[tuple[int, bool], ...] = ()
) -> PRN:
    """The network of a configuration (see configs/default.py), of an earlier version's too.

    Args:
      config: the configuration.
      num_prototypes: per scale; with tiles, per scale and place of a tile.
      turns: in which the product's images could lie as well, see `synthesis.pose`; of more than
        one it has no pose. With `average_turns` the network's, see `PRN`.

    Raises:
      UserError: there is no such backbone beside the network.
    """
    memory, decoder = config.get("memory", {}), config.get("decoder", {})
    beside = config.get("patch_map", {})
    # Before there was a memory, no steps meant as many as `epochs` says.
    trained = config.total_steps != 0 or not memory
    beside_name = beside.backbone.name if beside.get("weight") else ""
    if beside_name:
        backbone_spec(beside_name, "patch_map.backbone")
    tiling = Tiling.of(config)
    doublings, merge = looks(config, posed=len(turns) < 2)
    return PRN(
        backbone_name=config.backbone.name,
        train_stage4=config.backbone.train_stage4,
        doublings=doublings,
        merge=merge,
        # Without training no whole map is compared with; a checkpoint keeps its form.
        num_prototypes=num_prototypes * tiling.count if trained else 1,
        attention_layers=config.attention.layers,
        attention_scales=tuple(config.attention.get("scales", (1, 2, 3))),
        divisions=tuple(config.attention.divisions),
        attention_norm=config.attention.get("norm", False),
        use_prototypes=config.prototypes.get("enabled", True),
        use_stem=decoder.get("stem", False),
        decoder_channels=tuple(
            max(4, round(decoder.get("width", 1.0) * x)) for x in Decoder.channels
        ),
        decoder_stride=decoder.get("stride", 1),
        use_fusion=config.get("fusion", {}).get("enabled", True),
        num_patches=memory.get("patches", 0),
        memory_scales=tuple(memory.get("scales", (1, 2, 3))),
        window=memory.get("window", 0),
        num_centres=num_prototypes,
        score_distance=config.get("score_distance", 0.0),
        trained=trained,
        beside_name=beside_name,
        beside_weight=beside.get("weight", 0.0),
        beside_patches=beside.get("patches", 0),
        tiling=tiling if tiling.count > 1 else None,
        turns=turns if turns and config.average_turns else PRN.turns,
        dtype=compute_dtype(config),
    )
