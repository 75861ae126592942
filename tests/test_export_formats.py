"""Each format, from image files, in a process without this package, against prediction."""

import dataclasses
import importlib.util
import io
import json
import logging
import sys
import types

import absl.logging
import jax
import numpy as np
import pytest
import sklearn.metrics
from ml_collections import ConfigDict
from PIL import Image, PngImagePlugin

import prn_jax
from prn_jax import export, images, input_pipeline, train
from prn_jax import mesh as meshes
from prn_jax.errors import UserError
from prn_jax.export import calibration, check
from prn_jax.models.prn import create_model
from prn_jax.programs import export as programs_export
from prn_jax.splits import Images
from tests import tiny
from tests.trees import draw, save

CAMERA = (90, 120)
ALL = [(kind, False) for kind in export.FORMATS] + [("onnx", True)]


def metadata(kind, path):
    """What an export says of itself, read by its own runtime."""
    if kind == "savedmodel":
        return json.loads((path / "assets/prn_jax.json").read_text())
    if kind == "onnx":
        import onnxruntime

        found = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    else:
        import openvino

        model = openvino.Core().read_model(str(path / "model.xml"))
        names = ("category", "thresholds", "input")
        found = {name: model.get_rt_info(["prn_jax", name]).astype(str) for name in names}
    return {k: v if k == "category" else json.loads(v) for k, v in found.items() if k in
            ("category", "thresholds", "input")}  # fmt: skip


def tiled(whole):
    """A network of two tiles of 64x64, with a patch map beside, made of one of whole images."""
    config = whole.config.copy_and_resolve_references()
    config.tiles, config.tile_overlap, config.average_turns = (1, 2), 16, True
    config.patch_map.weight, config.patch_map.patches = 2.0, 8
    tiny.register()
    config.patch_map.backbone.name, config.patch_map.backbone.weights = "tiny", "random"
    model = create_model(config, whole.model.num_prototypes, ((0, False), (1, True)))
    fresh = train.initialise(config, model)
    stored = jax.device_get(whole.variables)
    stored["backbone"] |= {"beside": fresh["backbone"]["beside"]}
    roi = np.ones((64, 112), np.uint8)
    roi[20:40, :50] = 0
    prototypes = stored["prototypes"] | {"interest": {"mask": roi}}
    for scale in (x for x in prototypes if x.startswith("scale_")):
        # Of the second tile's place the same in another order.
        maps = prototypes[scale]["maps"]
        prototypes[scale] = prototypes[scale] | {"maps": np.concatenate([maps, maps[::-1]])}
    # Random, for the nearest to be one: what is not filled yet is 0.
    values = np.random.default_rng(0).random
    prototypes["beside"] = jax.tree.map(
        lambda x: values(x.shape).astype(np.float32), fresh["prototypes"]["beside"]
    )
    return dataclasses.replace(
        whole,
        model=model,
        config=config,
        variables=meshes.replicate(whole.mesh, stored | {"prototypes": prototypes}),
    )


def scoring_distances(detector):
    """The same network, whose distances have a part in scores."""
    prototypes = detector.variables["prototypes"]
    whole = prototypes["whole"] | {"exponent": meshes.replicate(detector.mesh, np.float32(0.7))}
    return dataclasses.replace(
        detector,
        model=detector.model.clone(score_distance=0.3),
        variables=detector.variables | {"prototypes": prototypes | {"whole": whole}},
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "int8"), ALL)
def test_an_export_runs_without_us_and_computes_the_same(
    trained, tmp_path, monkeypatch, caplog, kind, int8
):
    missing = [x for x in export.FORMATS[kind].NEEDS if importlib.util.find_spec(x) is None]
    if missing:
        pytest.skip(f"{missing} not installed: make test runs it in .venv-export")
    detector = prn_jax.load(trained)
    if (kind, int8) == ("onnx", False):  # what of `evaluate.stitched` ONNX does not know
        detector = tiled(detector)
    detector = scoring_distances(detector)
    split = check.read_run(trained)
    folder = tmp_path / "files"
    files = {
        "colour.png": draw(0, CAMERA), "grey.png": draw(1, CAMERA, channels=1),
        "Größe.jpg": draw(2, CAMERA), "other.png": draw(3, (70, 60)),
    }  # fmt: skip
    for name, array in files.items():
        save(folder / name, array)
    given = check.read_folder(folder, CAMERA, 0)
    assert "1 of 4 are not 90x120" in caplog.text
    given += check.enlarged(split, CAMERA)
    options = {} if export.is_exact(kind, int8) else {"split": split}
    if int8:
        # What two steps have taught is not worth being judged.
        monkeypatch.setattr(check, "MOST_LOST", 1.0)
        options["calibration"] = split.image[:8]
    out = tmp_path / "out" / "bolt [2]"
    handler = absl.logging.get_absl_handler()
    logging.root.addHandler(handler)
    checked = export.export(detector, kind, out, given, input_size=CAMERA, **options)
    assert handler in logging.root.handlers
    logging.root.removeHandler(handler)
    assert checked.images == len(given)
    if kind == "openvino":  # nobody's server is told of it
        assert sys.modules["openvino_telemetry"] is None
    if export.is_exact(kind, int8):
        assert checked.map_difference <= 1e-4
        assert checked.score_difference <= 1e-4
        assert checked.distance_difference <= 1e-4
        assert checked.verdicts == 0
    if int8:  # the frozen stages are not
        assert checked.distance_difference <= 1e-4
        assert checked.map_difference > 1e-4
    assert set(checked.figures) == (
        set() if export.is_exact(kind, int8) else {"image_auroc", "pixel_ap"}
    )
    names = ["bolt [2]", "bolt [2].golden", "bolt [2].json"]
    assert sorted(path.name for path in out.parent.iterdir()) == names
    about = json.loads((out.parent / names[2]).read_text())
    assert about["input"]["shape"] == ["any", *CAMERA, 3]
    assert about["thresholds"] == json.loads(json.dumps(detector.thresholds))
    if kind != "stablehlo":
        assert {k: about[k] for k in ("category", "thresholds", "input")}.items() <= metadata(
            kind, out
        ).items()
    # The golden set is what prediction says of its files.
    golden = out.parent / names[1]
    expected = json.loads((golden / "expected.json").read_text())
    limit = 1e-4 if export.is_exact(kind, int8) else 0.2
    for row in expected["images"]:
        found = detector.inspect(golden / row["image"])
        assert row["score"] == pytest.approx(float(found.score), abs=limit)
        assert row["distance"] == pytest.approx(float(found.distance), rel=10 * limit)
        assert np.load(golden / row["map"]).shape == detector.image_size
    assert len(expected["images"]) == 3
    assert images.read_array(golden / "0.png").shape == (*CAMERA, 3)


@pytest.mark.slow
def test_an_export_that_differs_is_not_written(trained, tmp_path, monkeypatch):
    wrong = check._AFTER.replace("np.concatenate(x)", "0.01 + np.concatenate(x)")
    assert wrong != check._AFTER
    monkeypatch.setattr(check, "_AFTER", wrong)
    files = check.enlarged(check.read_run(trained), (64, 64))[:2]
    with pytest.raises(UserError, match="differs from the checkpoint by 0.01"):
        export.export(prn_jax.load(trained), "stablehlo", tmp_path / "made", files)
    assert not list(tmp_path.iterdir())


def test_the_golden_set_says_what_each_image_is(tmp_path):
    maps = np.random.default_rng(0).random((3, 4, 5), np.float32)
    made = check.Results(maps, np.array([0.8, 0.2, 0.5]), np.array([1.0, 3.0, 2.0]), 1.0, 1.0)
    files = [images.encode_png(np.full((4, 5, 3), 9 * i, np.uint8)) for i in range(3)]
    check.write_golden(tmp_path / "golden", files, made, {"score": 0.5, "distance": 2.0})
    rows = json.loads((tmp_path / "golden/expected.json").read_text())["images"]
    assert [x["verdict"] for x in rows] == ["normal", "anomalous", "anomalous"]
    assert [x["unfamiliar"] for x in rows] == ["yes", "yes", "no"]
    for row, number in zip(rows, (1, 2, 0), strict=True):
        np.testing.assert_array_equal(np.load(tmp_path / "golden" / row["map"]), maps[number])
        assert (images.read_array(tmp_path / "golden" / row["image"]) == 9 * number).all()


def test_an_export_that_ends_without_a_word_is_explained(tmp_path):
    runner = types.SimpleNamespace(RUNNER="os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="signal 9 ended it; was there memory enough"):
        check.run("onnx", runner, tmp_path, [images.encode_png(np.zeros((4, 5), np.uint8))], 1)
    # Images may be as large, and say as much, as the user's own.
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * 2**21, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4)).save(buffer, "PNG", pnginfo=info)
    runner.RUNNER = "run = lambda x: (x[..., 0].astype(float), x.max((1, 2, 3)), x.max((1, 2, 3)))"
    found = check.run("onnx", runner, tmp_path, [buffer.getvalue()], 1)
    assert found.maps.shape == (1, 4, 5)


def test_the_size_of_a_camera_is_height_and_width():
    assert programs_export._size(["90", "120"]) == (90, 120)


@pytest.mark.slow
def test_it_is_calibrated_on_what_training_sees(trained):
    detector = prn_jax.load(trained)
    images = calibration.sample(detector)
    assert images.shape == (64, 64, 64, 3)
    assert images.dtype == np.uint8
    config = ConfigDict(detector.config)
    normal = input_pipeline.load_category(config, config.category).train.image

    def pixels(image):  # in whatever turn
        return np.sort(np.int32(image) @ [1 << 16, 1 << 8, 1], axis=None).tobytes()

    known = {pixels(x) for x in normal}
    share = config.sampling.normal / sum(config.sampling.values())
    assert sum(pixels(x) in known for x in images) == round(64 * share)


@pytest.mark.parametrize("batch", [1, 3])
def test_8_bits_of_onnx_leave_every_look_s_frozen_stages_alone(batch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from prn_jax.export.onnx import _quantised

    node, rng = onnx.helper.make_node, np.random.default_rng(0)
    nodes = [
        node("Cast", ["image"], ["colours"], "cast", to=onnx.TensorProto.FLOAT),
        node("Transpose", ["colours"], ["x"], "transpose", perm=[0, 3, 1, 2]),
        node("Conv", ["x", "own"], ["first"], "conv of the whole image"),
        node("ReduceMean", ["first"], ["distance"], "mean", axes=[1, 2, 3], keepdims=0),
        node("Conv", ["x", "further"], ["second"], "conv of a further look"),
        node("ArgMin", ["second"], ["choice"], "choice", axis=1),
        node("Cast", ["choice"], ["chosen"], "chosen", to=onnx.TensorProto.FLOAT),
        node("Mul", ["second", "chosen"], ["residual"], "residual"),
        node("Conv", ["residual", "decoder"], ["map"], "conv of the decoder"),
    ]
    value = onnx.helper.make_tensor_value_info
    image = value("image", onnx.TensorProto.UINT8, [batch, 8, 8, 3])
    given = [value(x, onnx.TensorProto.FLOAT, None) for x in ("map", "distance")]
    weights = [
        onnx.numpy_helper.from_array(rng.normal(size=(3, 3, 1, 1)).astype("f"), name)
        for name in ("own", "further", "decoder")
    ]
    graph = onnx.helper.make_graph(nodes, "looks", [image], given, weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 9
    made = _quantised(model, rng.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8), batch)
    restored = {x.output[0] for x in made.graph.node if x.op_type == "DequantizeLinear"}
    convs = [x for x in made.graph.node if x.op_type == "Conv"]
    assert len(convs) == 3
    rounded = [x.name for x in convs if restored.intersection(x.input)]
    assert rounded == ["conv of the decoder"]


def test_rounding_is_judged_by_what_it_costs():
    rng = np.random.default_rng(0)
    mask = np.zeros((40, 16, 16), np.uint8)
    mask[20:, 4:8, 4:8] = 1
    mask[39] = 0  # an anomalous image without a mask
    names = ["good"] * 20 + ["dent"] * 20
    split = Images(np.zeros((40, 16, 16, 3), np.uint8), mask, names, list(map(str, range(40))))
    maps = (0.3 * mask + rng.uniform(0, 0.5, mask.shape)).astype(np.float32)
    scores = maps.max(axis=(1, 2))
    own = check.Results(maps, scores, scores, 1.0)
    figures = check.judge("onnx", split, own, own)
    expected = sklearn.metrics.average_precision_score(mask[:39].ravel(), maps[:39].ravel())
    assert figures["pixel_ap"] == (pytest.approx(expected), pytest.approx(expected))
    expected = sklearn.metrics.roc_auc_score(split.label, own.scores)
    assert figures["image_auroc"][1] == pytest.approx(expected)
    coarse = check.Results(
        maps + 0.3 * rng.uniform(size=maps.shape).astype("f"), scores, scores, 1.0
    )
    with pytest.raises(UserError, match=r"loses more than 0.5 points: .* pixel AP .* before, .*"):
        check.judge("onnx", split, coarse, own)
    normal = split.pick(np.arange(20))
    some, _ = own.split(20)
    with pytest.raises(UserError, match="lacks normal or anomalous images"):
        check.judge("onnx", normal, some, some)
