import json

import numpy as np
import pytest
from etils import epath

from prn_jax import disk, results
from prn_jax.errors import UserError
from prn_jax.splits import Images


def make_run(category, value=0.9, dataset="mvtec_ad"):
    return {
        "category": category,
        "dataset": dataset,
        "metrics": dict.fromkeys(results.COLUMNS, value),
        "steps": 600,
        "config": {
            "batch_size": 16,
            "image_size": [128, 128],
            "backbone": {"name": "resnet18", "doublings": [-1, 0]},
            "attention": {"layers": 1},
        },
        "split": {"seed": 42, "seen": ["a", "b"]},
        "seed": 0,
    }


def test_a_run_comes_back(tmp_path):
    run = make_run("bottle")
    results.write_run(tmp_path / "bottle", run)
    assert results.read_run(tmp_path / "bottle") == run
    assert [p.name for p in (tmp_path / "bottle").iterdir()] == ["results.json"]


def test_a_damaged_run_is_named(tmp_path):
    (tmp_path / "results.json").write_text('{"metrics": ')
    with pytest.raises(UserError, match=r"results.json is damaged.*run the category again"):
        results.read_run(tmp_path)


def test_a_figure_that_is_not_finite_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write_run(tmp_path, make_run("bottle", float("nan")))
    assert not list(tmp_path.iterdir())


def test_the_table_has_the_paper_s_figures_of_the_same_categories(tmp_path):
    for name, value in (("pill", 0.98), ("bottle", 0.99)):
        results.write_run(tmp_path / name, make_run(name, value))
    results.write_table(tmp_path, "mvtec_ad")
    table = (tmp_path / "results.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    cells = {row[0]: row[1:] for row in rows}
    assert list(cells)[2:5] == ["bottle", "pill", "mean"]
    assert cells["mean"][0] == "98.5"
    # PRO of the paper's bottle and pill: 97.0 and 97.2; pixel AP: 92.3 and 91.3.
    assert cells["paper, the same 2 of 15"][2:4] == ["97.1", "91.8"]
    assert cells["paper, stated mean of 15"][:2] == ["99.4", "99.0"]
    summary = json.loads((tmp_path / "results.json").read_text())
    assert summary["mean"]["pro"] == pytest.approx(0.985)
    assert "pill" in results.render_table(tmp_path, "mvtec_ad")
    assert "- pill: resnet18, doublings [-1, 0], 1 attention layer; 600 steps of 16" in table


def test_beside_all_categories_is_the_mean_that_the_paper_states(tmp_path):
    for name in results.PAPER["mvtec_ad"]:
        results.write_run(tmp_path / name, make_run(name))
    text = results.render_table(tmp_path, "mvtec_ad")
    assert "the same" not in text  # the quoted figures' mean, 99.2
    assert "paper, stated mean of 15       99.4       99.0" in text


def test_what_a_category_lacks_has_no_mean(tmp_path):
    results.write_run(tmp_path / "pill", make_run("pill", 0.7))
    run = make_run("bottle", 0.9)
    results.write_run(tmp_path / "bottle", run | {"metrics": run["metrics"] | {"pro": None}})
    results.write_table(tmp_path, "mvtec_ad")
    mean = json.loads((tmp_path / "results.json").read_text())["mean"]
    assert mean["pro"] is None
    assert mean["pixel_ap"] is not None


def test_copies_and_tables_beside_runs_are_left_out_of_the_table(tmp_path, caplog):
    results.write_run(tmp_path / "bottle", make_run("bottle", 0.9))
    results.write_run(tmp_path / "bottle_old", make_run("bottle", 0.5))
    results.write_run(tmp_path / "runs" / "pill", make_run("pill", 0.7))
    results.write_table(tmp_path / "runs", "mvtec_ad")
    results.write_table(tmp_path, "mvtec_ad")
    assert json.loads((tmp_path / "results.json").read_text())["mean"]["pro"] == pytest.approx(0.9)
    assert "bottle_old, a run of bottle, is not in the table" in caplog.text
    (tmp_path / "pill").mkdir()
    (tmp_path / "pill" / "results.json").write_text("")
    with pytest.raises(UserError, match=r"pill/results.json is damaged"):
        results.write_table(tmp_path, "mvtec_ad")


def test_what_could_not_be_written_leaves_nothing(tmp_path):
    (tmp_path / "a.json" / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*a.json"):
        disk.write_file(epath.Path(tmp_path / "a.json"), "{}")
    assert [x.name for x in tmp_path.iterdir()] == ["a.json"]


def test_another_data_set_has_no_paper_row_and_missing_figures_are_dashes(tmp_path):
    run = make_run("bolt", dataset="folder")
    run["metrics"]["pro"] = None
    results.write_run(tmp_path / "bolt", run)
    results.write_table(tmp_path, "folder")
    table = (tmp_path / "results.md").read_text()
    assert "paper" not in table
    assert "| bolt | 90.0 | 90.0 | - |" in table


def test_the_paper_s_columns_average_to_the_means_it_states():
    table = results.PAPER["mvtec_ad"]
    for column, stated in results.PAPER_MEAN["mvtec_ad"].items():
        values = [row[column] for row in table.values()]
        if column == "image_auroc":
            values[list(table).index("carpet")] = 0.997  # see the note in results.py
        assert np.mean(values) == pytest.approx(stated, abs=0.0006)


def test_predictions_come_back_and_their_absence_is_named(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
    masks, maps = images[..., 0] % 2, rng.random((2, 4, 5)).astype(np.float32)
    test = Images(images, masks, ["good", "dent"], ["test/good/0", "test/dent/0"])
    rows = [{"id": id_, "defect": defect} for id_, defect in zip(test.id, test.defect)]
    results.write_run(tmp_path, make_run("bottle") | {"test": rows})
    results.write_predictions(tmp_path, test, maps)
    found, found_maps, roi = results.read_predictions(tmp_path)
    np.testing.assert_array_equal(found.image, images)
    np.testing.assert_array_equal(found.mask, masks)
    assert (found.defect, found.id) == (test.defect, test.id)
    np.testing.assert_allclose(found_maps, maps, atol=1e-3)
    assert roi is None
    results.write_predictions(tmp_path, test, maps, masks[0])
    np.testing.assert_array_equal(results.read_predictions(tmp_path)[2], masks[0])
    whole = (tmp_path / "predictions.npz").read_bytes()
    for damaged in (b"", whole[:-9]):
        (tmp_path / "predictions.npz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"predictions.npz is missing or damaged"):
            results.read_predictions(tmp_path)
    (tmp_path / "predictions.npz").unlink()
    with pytest.raises(UserError, match=r"predictions.npz is missing or damaged"):
        results.read_predictions(tmp_path)


def test_provenance_says_what_one_needs_to_run_it_again():
    found = results.provenance()
    assert found["versions"]["jax"] == __import__("jax").__version__
    assert found["device"]["backend"] == "cpu"
    assert found["date"].endswith("+00:00")
