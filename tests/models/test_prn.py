import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import default, mvtec_plus
from prn_jax import evaluate, experiment, predict
from prn_jax import mesh as meshes
from prn_jax.errors import UserError
from prn_jax.fields import checked
from prn_jax.models.attention import MultiSizeAttention
from prn_jax.models.backbone import BACKBONES, IMAGENET_MEAN, IMAGENET_STD, create_backbone
from prn_jax.models.decoder import Decoder
from prn_jax.models.fusion import MultiScaleFusion
from prn_jax.models.layers import upsample
from prn_jax.models.prn import PRN, compute_dtype, create_model
from tests import tiny

POSED = ((0, False),)
LOOSE = ((0, False), (1, True))


def init(model, size):
    image = jnp.zeros((1, *size, 3), jnp.uint8)
    return jax.jit(model.init)(jax.random.key(0), image)


def draw(count, size):
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)


@pytest.mark.parametrize("norm", [False, True])
def test_the_blocks_are_joined_as_in_the_figure(norm):
    """One after another by themselves; what each computes is compared with formulas elsewhere."""
    tiny.register()
    model = PRN(
        backbone_name="tiny", num_prototypes=3, attention_layers=2, attention_scales=(2, 3),
        divisions=(1, 2), attention_norm=norm, use_stem=True, decoder_channels=(8, 8, 8),
    )  # fmt: skip
    variables, image = init(model, (64, 64)), draw(4, (64, 64))

    def apply(block, name, *of):
        return block.apply({x: y[name] for x, y in variables.items() if name in y}, *of)

    normalised = (jnp.float32(image) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    stem, *features, deepest = apply(tiny.Tiny(return_stem=True), "backbone", normalised)
    residuals = []
    for scale, x in enumerate(features):
        # Each image's own nearest one of three, and not of each scale the same.
        stored = np.asarray(x)[scale : scale + 2].mean(axis=0, keepdims=True)
        stored = np.concatenate([stored, np.asarray(x)[:2] + 0.1])
        variables["prototypes"][f"scale_{scale}"]["maps"] = stored
        squared = np.square(np.asarray(x)[:, None] - stored)
        nearest = squared.sum(axis=(2, 3, 4)).argmin(axis=1)
        assert len(set(nearest)) > 1
        residuals.append(jnp.asarray(squared[np.arange(4), nearest]))
    fused = (
        apply(MultiScaleFusion(), "fuse_features", tuple(features)),
        apply(MultiScaleFusion(), "fuse_residuals", tuple(residuals)),
    )
    maps = [jnp.concatenate(pair, axis=-1) for pair in zip(*fused)]
    for scale, layer in ((1, 0), (1, 1), (2, 0), (2, 1)):
        block = MultiSizeAttention((1, 2), norm)
        maps[scale] = apply(block, f"attention_{scale}_{layer}", maps[scale], False)
    maps = apply(MultiScaleFusion(), "fuse_attended", tuple(maps))
    expected = apply(Decoder((8, 8, 8)), "decoder", deepest, maps, stem, False)
    found = jax.jit(model.apply)(variables, image)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "mean", "std", "gain"),
    [
        ("resnet18", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 1),
        ("efficientnet_lite0", 127, 128, 1 / 16),
    ],
)
def test_features_are_of_colours_as_the_published_weights_want_them(name, mean, std, gain):
    model, image = PRN(backbone_name=name), jnp.asarray(draw(2, (64, 64)))
    variables = jax.jit(lambda: model.init(jax.random.key(0), image, method="features"))()
    found = jax.jit(lambda x: model.apply(variables, x, method="features"))(image)
    alone = jax.jit(create_backbone(name).apply)
    own = {kind: tree["backbone"] for kind, tree in variables.items()}
    expected = alone(own, jnp.float32((np.asarray(image) - np.float64(mean)) / std))[:3]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, gain * y, atol=1e-4 * gain * np.abs(y).max())


@pytest.mark.parametrize(
    ("field", "value", "attribute", "expected"),
    [
        ("attention.layers", 1, "attention_layers", 1),
        ("attention.scales", (2, 3), "attention_scales", (2, 3)),
        ("attention.divisions", (2, 4), "divisions", (2, 4)),
        ("attention.norm", False, "attention_norm", False),
        ("backbone.train_stage4", False, "train_stage4", False),
        ("decoder.stem", True, "use_stem", True),
        ("decoder.width", 0.25, "decoder_channels", (16, 32, 64)),
        ("decoder.stride", 4, "decoder_stride", 4),
        ("dtype", "bfloat16", "dtype", jnp.bfloat16),
        ("fusion.enabled", False, "use_fusion", False),
        ("memory.patches", 7, "num_patches", 7),
        ("memory.scales", (2,), "memory_scales", (2,)),
        ("memory.window", 2, "window", 2),
        ("prototypes.enabled", False, "use_prototypes", False),
        ("score_distance", 0.3, "score_distance", 0.3),
        ("total_steps", 0, "trained", False),
    ],
)
def test_a_field_is_the_network_s(field, value, attribute, expected):
    config = default.get_config()
    before = create_model(config, 2)
    config.update_from_flattened_dict({field: value})
    after = create_model(config, 2)
    assert getattr(after, attribute) == expected
    assert getattr(before, attribute) != expected


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (160, 64)])
def test_one_logit_per_pixel_at_any_multiple_of_32(size):
    model = PRN(attention_layers=1, num_prototypes=2)
    logits = jax.jit(model.apply)(init(model, size), draw(2, size))
    assert logits.shape == (2, *size)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()


def test_an_enlarged_image_is_what_the_network_sees():
    plain, model = (PRN(doublings=(n,), attention_layers=0) for n in (0, 1))
    # Bilinear doubling weighs with sixteenths: of such levels whole ones come.
    image = draw(2, (64, 64)) // 16 * 16
    doubled = upsample(jnp.asarray(image, jnp.float32))
    assert jnp.array_equal(doubled, jnp.round(doubled))
    variables = init(model, (64, 64))
    whole = jnp.ones((128, 128), jnp.uint8)
    larger = variables | {"prototypes": variables["prototypes"] | {"interest": {"mask": whole}}}
    expected = np.asarray(jax.jit(plain.apply)(larger, doubled.astype(jnp.uint8)))
    expected = expected.reshape(2, 64, 2, 64, 2).mean(axis=(2, 4))
    found = jax.jit(model.apply)(variables, image)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_halved_image_is_what_the_network_sees():
    plain, model = (PRN(doublings=(n,), attention_layers=0) for n in (0, -1))
    image = draw(2, (64, 128)) // 4 * 4  # of four such levels the mean is a whole one
    variables = init(model, (64, 128))
    part = jnp.ones((32, 64), jnp.uint8)
    smaller = variables | {"prototypes": variables["prototypes"] | {"interest": {"mask": part}}}
    halved = image.astype(int).reshape(2, 32, 2, 64, 2, 3).mean(axis=(2, 4)).astype(np.uint8)
    logits = jax.jit(plain.apply)(smaller, halved)
    expected = np.asarray(jax.image.resize(logits, (2, 64, 128), "bilinear"))
    found = jax.jit(model.apply)(variables, image)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("looks", "merge", "merged"),
    [((0, 1), "mean", lambda x: sum(x) / 2), ((-1, 0), "max", lambda x: np.maximum(*x))],
)
def test_two_looks_are_two_networks_with_one_backbone(looks, merge, merged):
    both = PRN(
        doublings=looks, merge=merge, attention_layers=0, num_prototypes=2,
        decoder_channels=(8, 8, 8),
    )  # fmt: skip
    variables, image = init(both, (64, 64)), draw(2, (64, 64))
    found = jax.jit(both.apply)(variables, image)
    alone = []
    for times, further in zip(looks, ("none", "closer_0")):
        # What follows the backbone is the network's own, or that of the further look.
        own = {kind: tree | tree.get(further, {}) for kind, tree in variables.items()}
        for tree in own.values():
            tree.pop("closer_0", None)
        alone.append(jax.jit(both.clone(doublings=(times,)).apply)(own, image))
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    np.testing.assert_allclose(found, merged(alone), rtol=1e-5, atol=1e-5)


def test_a_patch_map_of_another_backbone_is_added_to_what_is_trained():
    tiny.register()
    plain = PRN(
        backbone_name="tiny", attention_layers=0, doublings=(-1, 0), merge="max",
        decoder_channels=(8, 8, 8), turns=((0, False), (0, True)),
    )  # fmt: skip
    model = plain.clone(beside_name="tiny", beside_weight=0.5, beside_patches=5)
    variables, image = init(model, (64, 64)), draw(2, (64, 64))
    parts = {kind: tree.pop("beside") for kind, tree in variables.items() if "beside" in tree}
    assert set(parts) == {"backbone", "prototypes"}  # nothing of it is trained
    same = jax.eval_shape(plain.init, jax.random.key(0), image)
    assert jax.tree.structure(variables) == jax.tree.structure(same)
    assert set(parts["backbone"]["backbone"]) == {"one_conv", "two_conv", "three_conv"}
    parts["prototypes"]["patch_map"]["reference"] = np.float32(3.0)
    alone = PRN(backbone_name="tiny", stages=3, num_patches=5, trained=False)
    distance = jax.jit(alone.apply)(parts, image)
    whole = {kind: tree | {"beside": parts[kind]} if kind in parts else tree
             for kind, tree in variables.items()}  # fmt: skip
    found = jax.jit(model.apply)(whole, image)
    expected = jax.jit(plain.apply)(variables, image) + 0.5 * distance
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(distance).max() > 0.1
    # Training does without.
    train = {"method": "learning", "mutable": ["batch_stats"]}
    each = jax.vmap(lambda x: model.apply(whole, x[None], **train)[0], axis_name="data")
    graph = jax.make_jaxpr(each)(image)
    same = jax.vmap(lambda x: plain.apply(variables, x[None], **train)[0], axis_name="data")
    assert len(graph.eqns) == len(jax.make_jaxpr(same)(image).eqns)


def test_a_map_may_be_the_mean_over_turns():
    turns = ((0, False), (1, True), (3, False))
    plain = PRN(attention_layers=0, num_prototypes=2, decoder_channels=(8, 8, 8))
    variables, image = init(plain, (64, 64)), draw(2, (64, 64))
    model = plain.clone(turns=turns)
    assert jax.tree.structure(init(model, (64, 64))) == jax.tree.structure(variables)
    step = jax.jit(plain.apply, static_argnames="method")
    expected = 0
    for quarters, mirrored in turns:
        turned = np.rot90(image, quarters, (1, 2))
        turned = np.asarray(step(variables, turned[:, :, ::-1] if mirrored else turned))
        turned = turned[:, :, ::-1] if mirrored else turned
        expected = expected + np.rot90(turned, -quarters, (1, 2)) / 3
    found, distance = jax.jit(model.apply, static_argnames="method")(
        variables, image, method="inspect"
    )
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(found - step(variables, image)).max() > 1e-3
    # The whole image is described as it is, and training sees each image once.
    np.testing.assert_allclose(distance, step(variables, image, method="inspect")[1], rtol=1e-5)
    train = {"method": "learning", "mutable": ["batch_stats"]}
    steps = [
        jax.jit(
            jax.vmap(lambda x, m=m: m.apply(variables, x[None], **train)[0][0], axis_name="data")
        )
        for m in (plain, model)
    ]
    np.testing.assert_array_equal(*(x(image) for x in steps))


@pytest.mark.parametrize("doublings", [(0,), (1,), (2,), (0, 1), (-1,), (-2, 1)])
def test_an_enlarged_image_has_a_map_of_its_own_size_without_training(doublings):
    model = PRN(doublings=doublings, num_patches=4, trained=False)
    image = jax.ShapeDtypeStruct((2, 128, 256, 3), jnp.uint8)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    assert jax.eval_shape(model.apply, variables, image).shape == (2, 128, 256)


def test_an_image_is_not_resized_without_end():
    config = default.get_config()
    for wrong in ((3,), (-3,), (0, 0), (1.0,), (True,)):
        config.backbone.doublings = wrong
        with pytest.raises(UserError, match=r"doublings=.*: give some of -2, -1, 0, 1, 2, each"):
            checked(config)
    config.backbone.doublings, config.image_size = (0, -1), (256, 96)
    with pytest.raises(UserError, match=r"image_size=.*96.*doublings has -1.*multiples of 64"):
        checked(config)


@pytest.mark.parametrize(
    ("size", "turns", "doublings", "merge"),
    [
        ((256, 256), (), (-1, 0), "max"),
        ((256, 256), POSED, (-1, 0), "max"),
        ((256, 256), LOOSE, (0,), "max"),
        ((512, 224), LOOSE, (0, 1), "mean"),
        ((128, 128), POSED, (0, 1), "mean"),
    ],
)
def test_looks_by_the_size_of_the_image_and_whether_it_has_a_pose(size, turns, doublings, merge):
    config = mvtec_plus.get_config()
    config.image_size = size
    for _ in range(2):
        config = checked(config)
        for average in (False, True):
            config.average_turns = average
            model = create_model(config, 1, turns)
            assert (model.doublings, model.merge) == (doublings, merge)
            assert model.turns == (LOOSE if average and turns == LOOSE else POSED)
    config.backbone.merge, config.backbone.doublings = "mean", (2, 1)
    model = create_model(checked(config), 1, turns)
    assert (model.doublings, model.merge) == ((2, 1), "mean")


def test_a_way_to_merge_that_there_is_not():
    config = default.get_config()
    config.backbone.merge = "least"
    with pytest.raises(UserError, match=r"backbone.merge='least': give auto, mean or max"):
        checked(config)


@pytest.mark.slow
def test_a_product_without_a_pose_is_looked_at_once(tmp_path):
    config = tiny.run_config(tmp_path, size=(100, 100), train=4, **{
        "image_size": (256, 256), "total_steps": 1, "backbone.doublings": (),
        "backbone.merge": "auto",
    })  # fmt: skip
    experiment.train_and_evaluate(config, str(tmp_path / "work"))
    run = json.loads((tmp_path / "work" / "bottle" / "results.json").read_text())
    detector = predict.load(tmp_path / "work" / "bottle")
    assert detector.model.doublings == (0,)
    assert detector.model.turns == POSED  # average_turns is off
    _, scores = detector([f"{tmp_path}/raw/bottle/{x['id']}.png" for x in run["test"]])
    np.testing.assert_allclose(scores, [x["score"] for x in run["test"]], atol=1e-5)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_backbone_fits(name):
    model = PRN(backbone_name=name, attention_layers=1)
    image = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    assert jax.eval_shape(model.apply, variables, image).shape == (2, 64, 64)
    channels = [variables["prototypes"][f"scale_{i}"]["maps"].shape[-1] for i in range(3)]
    assert tuple(channels) == BACKBONES[name].channels[:3]


def test_an_image_s_logits_do_not_depend_on_its_batch():
    model = PRN(attention_layers=1, num_prototypes=2)
    variables, images = init(model, (64, 64)), jnp.asarray(draw(4, (64, 64)))
    apply = jax.jit(model.apply)
    together = apply(variables, images)
    alone = jnp.concatenate([apply(variables, images[i : i + 1]) for i in range(4)])
    scale = float(jnp.abs(together).max())
    np.testing.assert_allclose(together, alone, atol=1e-4 * scale)


def test_the_number_of_attention_layers_counts():
    small, large = (PRN(attention_layers=n) for n in (1, 3))
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    counts = [
        sum(name.startswith("attention") for name in shapes["params"])
        for shapes in (jax.eval_shape(m.init, jax.random.key(0), image) for m in (small, large))
    ]
    assert counts == [3, 9]


def test_attention_is_where_it_is_asked_for():
    model = PRN(attention_layers=2, attention_scales=(2, 3))
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    names = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    found = sorted(name for name in names if name.startswith("attention"))
    assert found == ["attention_1_0", "attention_1_1", "attention_2_0", "attention_2_1"]


def test_bfloat16_computes_but_keeps_variables_and_logits_float32():
    model = PRN(attention_layers=1, dtype=jnp.bfloat16)
    variables = init(model, (64, 64))
    kinds = {x.dtype for x in jax.tree.leaves(variables)}
    assert kinds == {np.dtype(np.float32), np.dtype(np.uint8)}  # the region of interest is a mask
    images = jnp.asarray(draw(2, (64, 64)))
    exact, rounded = (jax.jit(m.apply)(variables, images) for m in (PRN(attention_layers=1), model))
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - exact).mean() < 0.1 * np.abs(exact).mean()


@pytest.mark.parametrize(
    ("backend", "capability", "expected"),
    [
        ("cpu", None, jnp.float32),
        ("tpu", None, jnp.bfloat16),
        ("gpu", "7.5", jnp.float32),
        ("gpu", "8.0", jnp.bfloat16),
        ("gpu", "12.0", jnp.bfloat16),
        ("gpu", "gfx90a", jnp.bfloat16),
    ],
)
def test_auto_is_the_type_that_the_device_computes_in(backend, capability, expected, monkeypatch):
    device = types.SimpleNamespace(**{"compute_capability": capability} if capability else {})
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert compute_dtype(default.get_config()) == expected


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_float32_is_not_rounded_by_the_device(platform):
    """Each product and conv of a training step, forth and back, asks for it."""
    tiny.register()
    model = PRN(backbone_name="tiny", attention_layers=1, divisions=(1, 2), use_stem=True,
                num_patches=4, window=1, decoder_channels=(8, 8, 8))  # fmt: skip
    image = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)

    def loss(params, rest, image):
        found, _ = model.apply(
            {"params": params} | rest, image, method="learning", mutable=["batch_stats"]
        )
        return jnp.square(found[0]).mean()

    rest = {name: x for name, x in variables.items() if name != "params"}
    step = jax.jit(jax.vmap(jax.grad(loss), (None, None, 0), axis_name="data"))
    many = jax.ShapeDtypeStruct((1, *image.shape), image.dtype)
    text = step.trace(variables["params"], rest, many).lower(
        lowering_platforms=(platform,)
    ).as_text()  # fmt: skip
    lines = [x for x in text.splitlines() if "dot_general" in x or "stablehlo.convolution" in x]
    assert len(lines) > 100
    assert [x for x in lines if x.count("HIGHEST") != 2] == []  # of both factors


def test_every_image_is_predicted_once_whatever_the_batch():
    model = PRN(attention_layers=1)
    variables, images = init(model, (64, 64)), draw(11, (64, 64))
    results = []
    for devices, batch_size in ((1, 11), (8, 8), (2, 4)):
        mesh = meshes.create_mesh(jax.devices()[:devices])
        placed = meshes.replicate(mesh, variables)
        results.append(evaluate.predict(model, placed, images, mesh, batch_size=batch_size))
    # Untrained logits are steep: rounding shows in the third digit.
    for maps, scores, distances in results[1:]:
        np.testing.assert_allclose(maps, results[0][0], atol=5e-3)
        np.testing.assert_allclose(scores, results[0][1], atol=5e-3)
        np.testing.assert_allclose(distances, results[0][2], rtol=1e-4)


@pytest.mark.parametrize(("size", "count"), [((256, 256), 100), ((128, 128), 25), ((32, 32), 2)])
def test_the_score_is_the_mean_of_the_highest_pixels(size, count):
    maps = np.random.default_rng(0).random((3, *size)).astype(np.float32)
    expected = np.sort(maps.reshape(3, -1), axis=1)[:, -count:].mean(axis=1)
    np.testing.assert_allclose(evaluate.image_score(jnp.asarray(maps), 100), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_the_decoder_may_see_the_first_map(name):
    """Otherwise nothing finer than stride 4 reaches it; what is off is not there."""
    image = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)
    kernels = {}
    for use_stem in (False, True):
        model = PRN(backbone_name=name, attention_layers=0, use_stem=use_stem)
        params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]["decoder"]
        kernels[use_stem] = {x: y["kernel"].shape for x, y in params.items() if "kernel" in y}
    added = kernels[True].pop("stem")
    assert kernels[True] == kernels[False]
    assert added == (1, 1, {"resnet18": 64, "efficientnet_lite0": 32}[name], 32)
    stem = create_backbone(name, return_stem=True)
    maps = jax.eval_shape(stem.init_with_output, jax.random.key(0), jnp.zeros((1, 64, 96, 3)))[0]
    assert [x.shape[1:3] for x in maps] == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize(("stride", "levels"), [(1, 5), (2, 4), (4, 3)])
def test_a_coarser_and_narrower_decoder_leaves_levels_out(stride, levels):
    """Its logits are of the image's size, and the widest kernel is half as wide."""
    image = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.uint8)
    model = PRN(attention_layers=0, decoder_channels=(32, 64, 128), decoder_stride=stride)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    assert logits.shape == (2, 64, 96)
    decoder = flatten_dict(variables["params"]["decoder"])
    kernels = [x.shape for path, x in decoder.items() if path[-1] == "kernel"]
    ones = [x for x in kernels if x[:2] == (1, 1)]
    assert len(ones) == levels
    assert max(x[-1] for x in kernels) == 128
