"""What is done with a trained network, and with a configuration before training."""

import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image
from sklearn import metrics as skmetrics

import prn_jax
from prn_jax import explain, images, input_pipeline, judge, report, results
from prn_jax.errors import UserError
from tests import trees
from tests.processes import environment, start
from tests.steps import PRODUCT

ROOT = pathlib.Path(__file__).resolve().parent.parent


def execute(script, *arguments):
    return subprocess.run(
        [sys.executable, f"launch/{script}.py", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_prediction_repeats_the_evaluation(trained, caplog):
    run = results.read_run(trained)
    test, stored, _ = results.read_predictions(trained)
    caplog.clear()
    detector = prn_jax.load(trained)
    assert not [x for x in caplog.records if "/orbax/" in x.pathname]
    assert detector.thresholds["image"] == run["thresholds"]["image"]
    maps, scores = detector(test.image)
    assert maps.shape == stored.shape
    np.testing.assert_allclose(maps, stored, atol=1e-3)
    np.testing.assert_allclose(scores, [x["score"] for x in run["test"]], atol=1e-5)
    np.testing.assert_allclose(
        detector.inspect(test.image).distance, [x["distance"] for x in run["test"]], rtol=1e-4
    )
    normals = explain.read(trained)
    nearest = [id_ for id_, _ in explain.explain(detector, normals, list(test.image))]
    assert nearest == [x["nearest"] for x in run["test"]]
    assert set(nearest) <= set(normals.id)
    # Any sizes, and grey: each map at its image's own size.
    image = test.image[0]
    images = [image, image[..., 0], np.zeros((70, 130, 3), np.uint8)]
    maps, scores = detector(images)
    assert [m.shape for m in maps] == [(64, 64), (64, 64), (70, 130)]
    assert scores.shape == (3,)
    maps, scores = detector([])
    assert len(maps) == len(scores) == 0
    with pytest.raises(UserError, match=r"float32: give uint8"):
        detector([image.astype(np.float32)])
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*\[2\]"):
        prn_jax.load(trained, step=7)


@pytest.mark.slow
def test_a_copy_of_the_checkpoints_decides_as_the_run_does(trained, tmp_path, caplog):
    assert prn_jax.load(trained, white_level=4095).white_level == 4095
    with pytest.raises(UserError, match="results.json: give <workdir>/<category> of a training"):
        prn_jax.load(trained / "results.json")
    copy = pathlib.Path(shutil.copytree(trained / "checkpoints", tmp_path / "copy"))
    stored = json.loads((copy / "thresholds.json").read_text())
    assert prn_jax.load(copy).thresholds == stored
    (copy / "thresholds.json").write_text(json.dumps(stored | {"step": 1}))
    assert prn_jax.load(copy).thresholds is None
    assert "thresholds left out" in caplog.text
    (copy / "thresholds.json").write_text(json.dumps(stored | {"network": "another"}))
    assert prn_jax.load(copy).thresholds is None
    assert "is of another network than the checkpoint" in caplog.text
    (copy / "thresholds.json").write_text(json.dumps(stored | {"dtype": "bfloat16"}))
    assert prn_jax.load(copy).thresholds
    assert "computed in float32 here, in bfloat16 where" in caplog.text
    (copy / "thresholds.json").write_text("{")
    with pytest.raises(UserError, match="is damaged: remove it and give"):
        prn_jax.load(copy)
    with pytest.raises(UserError, match="no checkpoint at"):
        prn_jax.load(trained / "nothing")


def test_prediction_resizes_as_training_does():
    image = np.random.default_rng(0).integers(0, 256, (301, 200, 3)).astype(np.uint8)
    expected = tf.image.resize(image, (64, 96), antialias=True).numpy()
    assert np.abs(images.resize(image, (64, 96)) - expected).max() <= 1.0


@pytest.mark.slow
def test_predict_reports_a_bad_file_and_does_the_others(trained, tmp_path):
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    image = results.read_predictions(trained)[0].image[0]
    rng = np.random.default_rng(0)
    Image.fromarray(image).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 2**16, (50, 90), np.uint16)).save(folder / "deeper/a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image[:40]).save(folder / "turned.jpg", exif=exif)
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:500])
    output = tmp_path / "out"
    result = execute(
        "predict", f"--checkpoint={trained}", f"--output={output}", "--explain", folder
    )
    assert result.returncode == 1
    assert "cut.png: not a readable image" in result.stderr
    assert "Traceback" not in result.stderr
    with (output / "predictions.csv").open() as file:
        rows = {pathlib.Path(row["image"]).relative_to(folder).as_posix(): row
                for row in csv.DictReader(file)}  # fmt: skip
    assert rows.keys() == {"a.png", "cut.png", "deeper/a.png", "turned.jpg"}
    _, scores = prn_jax.load(trained)([image])
    assert float(rows["a.png"]["score"]) == pytest.approx(float(scores[0]), abs=1e-5)
    threshold = results.read_run(trained)["thresholds"]["image"]
    for name, row in rows.items():
        if name == "cut.png":
            assert row["error"]
            assert not row["score"]
        else:
            called = "anomalous" if float(row["score"]) >= threshold else "normal"
            assert row["verdict"] == called
    assert len(json.loads((output / "predictions.json").read_text())) == 4
    sizes = {
        path.relative_to(output).as_posix(): Image.open(path).size for path in output.rglob("*.png")
    }
    assert sizes == {
        f"{stem}_{kind}.png": size
        for stem, size in (("a", (64, 64)), ("deeper/a", (90, 50)), ("turned", (40, 64)))
        for kind in ("heat", "mask", "overlay")
    } | {name: size for name, size in sizes.items() if name.endswith("_why.png")}
    assert sum(name.endswith("_why.png") for name in sizes) == sum(
        bool(row["nearest"]) for row in rows.values()
    )
    result = execute("predict", f"--checkpoint={trained}", "--threshold=nan", folder)
    assert result.returncode == 1
    assert "--threshold=nan: give a value from 0 to 1" in result.stderr
    result = execute("predict", f"--checkpoint={trained}", tmp_path / "nothing*")
    assert result.returncode == 1
    assert "nothing*: there are no images" in result.stderr


@pytest.mark.slow
def test_a_checkpoint_is_judged_on_other_images(trained, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="--output=.*/taken/out: Not a directory"):
        judge.prepare(tmp_path / "taken/out")
    test, run = results.read_predictions(trained)[0], results.read_run(trained)
    config = ConfigDict(run["config"]).unlock()
    config.image_size = tuple(config.image_size)
    seen = input_pipeline.load_category(config, PRODUCT).seen.image
    for number, (image, row) in enumerate(zip(test.image, run["test"])):
        folder = "good" if row["defect"] == "good" else "Ü 划痕"
        trees.save(tmp_path / f"day/test/{folder}/{number:03d}.png", image)
        if row["defect"] != "good":
            mask = test.mask[number] * np.uint8(255)
            trees.save(tmp_path / f"day/ground_truth/{folder}/{number:03d}.png", mask)
    trees.save(tmp_path / "day/test/Ü 划痕/renamed.png", seen[0])
    output = tmp_path / "out"
    result = execute("evaluate", f"--checkpoint={trained}", f"--images={tmp_path}/day",
                     f"--output={output}")  # fmt: skip
    assert result.returncode == 0, result.stderr
    left_out = f"1 of {len(test) + 1} images were trained on and are left out"
    assert f"{left_out}: test/Ü 划痕/renamed" in result.stderr
    assert "1 anomalous images have no mask" in result.stderr
    found = json.loads((output / "evaluation.json").read_text())
    scores = np.array([row["score"] for row in found["images"]])
    truth = np.array([row["defect"] != "good" for row in found["images"]])
    before = [row["score"] for row in run["test"]]
    np.testing.assert_allclose(np.sort(scores), np.sort(before), atol=1e-5)
    expected = skmetrics.roc_auc_score(truth, scores)
    assert found["metrics"]["image_auroc"] == pytest.approx(expected, abs=1e-9)
    at, called = found["thresholds"]["stored"], scores >= run["thresholds"]["image"]
    assert at["recall"] == pytest.approx(skmetrics.recall_score(truth, called))
    assert at["false_alarms"] == pytest.approx(called[~truth].mean())
    assert at["precision"] == pytest.approx(skmetrics.precision_score(truth, called))
    assert result.stdout == (output / "evaluation.md").read_text()
    assert found["chosen_by"] == len(test)
    assert f"thresholds were chosen by {len(test)} of these images: their row" in result.stdout
    with Image.open(output / "evaluation.png") as sheet:
        assert sheet.width > 300
    # Of its own data what was held out.
    result = execute("evaluate", f"--checkpoint={trained}", "--split=train", f"--output={output}")
    assert result.returncode == 0, result.stderr
    assert "5 of 6 images were trained on and are left out" in result.stderr
    found = json.loads((output / "evaluation.json").read_text())
    assert [row["id"] for row in found["images"]] == run["split"]["held"]
    assert found["source"]["split"] == "train"
    assert found["chosen_by"] == 1
    two = ["--images=day", "--split=train"]
    result = execute("evaluate", f"--checkpoint={trained}", *two, f"--output={output}")
    assert result.returncode == 1
    assert "give one" in result.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_predicted_and_the_same_command_goes_on(trained, tmp_path):
    image = results.read_predictions(trained)[0].image[0]
    for number in range(300):
        Image.fromarray(np.roll(image, number, axis=1)).save(tmp_path / f"{number:03d}.png")
    arguments = ["predict", f"--checkpoint={trained}", f"--output={tmp_path}/out", "--nopictures",
                 "--batch_size=1", tmp_path]  # fmt: skip
    process = start([sys.executable, f"launch/{arguments[0]}.py", *map(str, arguments[1:])])
    table = tmp_path / "out/predictions.csv"

    def rows():
        with table.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    while not table.exists() or len(rows()) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 130, log
    assert log.splitlines()[-1] == (
        "interrupted; the same command goes on with the images that are left"
    )
    assert "Traceback" not in log
    kept = rows()
    assert 3 <= len(kept) < 300
    result = execute(*arguments)
    assert result.returncode == 0, result.stderr
    assert f"{len(kept)} of 300 images were done before" in result.stderr
    assert len(rows()) == 300
    assert rows()[: len(kept)] == kept


@pytest.mark.slow
def test_the_report_is_of_any_product(trained, tmp_path):
    report.write_report(trained.parent, tmp_path / "report.html")
    assert PRODUCT in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"| {PRODUCT} |" in (trained.parent / "results.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_preview_is_a_picture(tmp_path):
    result = execute(
        "preview", "--config=configs/demo.py", f"--output={tmp_path}/sheet.png", "--columns=3",
        "--config.image_size=64", f"--config.data.data_dir={tmp_path}/records",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{tmp_path}/sheet.png"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 600
        assert len(sheet.getcolors(2**24)) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "infer", "kmeans"])
def test_the_benchmark_needs_no_data_and_no_tensorflow(what, tmp_path):
    code = (
        "from tests import tiny; tiny.register();"
        "import sys, runpy; sys.modules['tensorflow'] = None;"
        "sys.modules['tensorflow_datasets'] = None;"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = [f"--what={what}", "--json", "--config.image_size=64", "--num_normal=20"]
    if what != "kmeans":
        arguments += ["--batch_sizes=8", "--config.attention.layers=0",
                      "--config.fusion.enabled=False",
                      "--config.backbone.name=tiny"]  # fmt: skip
    if what == "infer":
        arguments.append(f"--profile={tmp_path}")
    result = subprocess.run(
        [sys.executable, "-c", code, "launch/benchmark.py", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["jax"] == jax.__version__
    if what == "kmeans":
        assert figures["scale_0_s"] > 0
    else:
        low, high = figures["spread_ms"]
        assert 0 < low <= figures["step_ms"] <= high
        assert figures["images_per_s"] == pytest.approx(8e3 / figures["step_ms"])
        assert figures["gflop_per_image"] > 0.001
    traces = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.xplane.pb")}
    assert traces == ({"infer_float32_8"} if what == "infer" else set())
