import contextlib
import logging
import pathlib
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_datasets.core import shuffle

from prn_jax import datasets, splits
from prn_jax.datasets import base
from prn_jax.errors import UserError
from tests import trees


@pytest.fixture
def log(caplog):
    """Returns a function that returns what was logged, at least of a level."""
    caplog.set_level(logging.INFO, logger="absl")
    return lambda level=logging.INFO: [r.getMessage() for r in caplog.records if r.levelno >= level]


@pytest.fixture
def prepare(tmp_path):
    def prepare(name, category, manual_dir=tmp_path / "raw"):
        return datasets.prepare(
            name, category, manual_dir=manual_dir, data_dir=tmp_path / "records"
        )

    return prepare


def _read(builder, split: str) -> list[dict]:
    return list(builder.as_dataset(split=split).as_numpy_iterator())


def _check(builder, written: dict, defects: dict[str, str], exact: bool = True) -> None:
    """Compares all records with the arrays that were written."""
    records = {
        record["id"].decode(): record
        for split in builder.info.splits
        for record in _read(builder, split)
    }
    assert set(records) == set(written)
    for id_, (image, mask) in written.items():
        record = records[id_]
        if image.ndim == 2:
            image = np.stack([image] * 3, axis=-1)
        if exact:
            np.testing.assert_array_equal(record["image"], image)
        np.testing.assert_array_equal(record["mask"][..., 0], mask)
        assert record["label"] == mask.any()
        assert record["defect"].decode() == (defects[id_] if mask.any() else "good")


def test_mvtec_ad(tmp_path, prepare, log):
    written = trees.make_mvtec(tmp_path / "raw", "screw", channels=1)
    builder = prepare("mvtec_ad", "screw")
    _check(builder, written, {id_: id_.split("/")[1] for id_ in written})
    for split, number in (("train", 4), ("test", 7)):
        ids = [record["id"] for record in _read(builder, split)]
        assert ids == sorted(ids)
        assert len(ids) == number
    assert builder.seen_from == "test"
    features = builder.info.features
    assert features["label"].names == ["normal", "anomalous"]
    assert features["mask"].shape == (None, None, 1)
    warnings = log(logging.WARNING)
    assert len(warnings) == 1
    assert "4 train normal images (officially 320)" in warnings[0]
    assert "train defective" not in warnings[0]
    assert sum("mvtec_ad/screw: train 4 good; test 3 broken_large" in line for line in log()) == 1


def test_mvtec_ad_has_its_official_counts():
    builder = datasets.BUILDERS["mvtec_ad"]
    assert np.sum(list(builder.counts.values()), axis=0).tolist() == [3629, 0, 467, 1258]
    assert [config.name for config in builder.BUILDER_CONFIGS] == list(builder.counts)
    assert len(builder.counts) == 15


@pytest.mark.parametrize("category", ["01", "02", "03"])
@pytest.mark.parametrize("below", ["", "BTech_Dataset_transformed"])
def test_btad(tmp_path, prepare, category, below):
    written = trees.make_btad(tmp_path / "raw" / below, category)
    _check(prepare("btad", category), written, dict.fromkeys(written, "ko"))
    counts = np.sum(list(datasets.BUILDERS["btad"].counts.values()), axis=0)
    assert counts.tolist() == [1799, 0, 451, 290]


def test_dagm2007(tmp_path, prepare, log):
    written = trees.make_dagm(tmp_path / "raw", "Class7")
    builder = prepare("dagm2007", "Class7")
    _check(builder, written, dict.fromkeys(written, "defect"))
    # The seen anomalies are in the training split.
    assert builder.seen_from == "train"
    assert sum(record["label"] for record in _read(builder, "train")) == 2
    assert not any("skipped" in line for line in log())  # Labels.txt belongs there.
    counts = np.sum(list(builder.counts.values()), axis=0)
    assert counts.tolist() == [8050 - 1046, 1046, 8050 - 1054, 1054]


def test_kolektor_sdd2(tmp_path, prepare):
    written = trees.make_kolektor_sdd2(tmp_path / "raw")
    builder = prepare("kolektor_sdd2", "kolektor_sdd2")
    _check(builder, written, dict.fromkeys(written, "defect"))
    assert builder.seen_from == "train"
    assert sum(record["label"] for record in _read(builder, "train")) == 2
    (tmp_path / "raw/train/10003_GT.png").unlink()
    with pytest.raises(UserError, match=r"10003.png: an image without a mask; .*10003_GT.png"):
        prepare("kolektor_sdd2", "kolektor_sdd2")


def test_kolektor_sdd_for_real(shared, tmp_path, log):
    builder = datasets.prepare(
        "kolektor_sdd2",
        "kolektor_sdd2",
        manual_dir=shared / "data/kolektor_sdd_176x480",
        data_dir=tmp_path,
    )
    for split, normal, defective in (("train", 237, 34), ("test", 110, 18)):
        records = _read(builder, split)
        labels = [record["label"] for record in records]
        assert (labels.count(0), labels.count(1)) == (normal, defective)
        assert all(record["image"].shape == (480, 176, 3) for record in records)
        assert all(record["mask"].any() == record["label"] for record in records)
    assert "237 train normal images (officially 2085)" in log(logging.WARNING)[-1]


def _make_mixed(root) -> dict:
    """Makes a product of mixed file types, upper case, and with both names for masks."""
    written = trees.make_mvtec(root, "widget", defects={"dent": 2, "spot": 2}, image_ext="bmp")
    product = root / "widget"
    (product / "train/good/000.bmp").rename(product / "train/good/000.BMP")
    image = written["train/good/001"][0]
    trees.save(product / "train/good/001.TIFF", image)
    (product / "train/good/001.bmp").unlink()
    masks = product / "ground_truth/dent"
    (masks / "000_mask.png").rename(masks / "000.PNG")
    trees.save(masks / "001_mask.bmp", written["test/dent/001"][1])
    (masks / "001_mask.png").unlink()
    return written


@pytest.mark.parametrize("inside", [False, True])
def test_folder(tmp_path, prepare, log, inside):
    written = _make_mixed(tmp_path / "raw")
    (tmp_path / "raw/notes").mkdir()
    (tmp_path / "raw/widget/test/dent/notes.txt").write_text("a stray file")
    for part in ("test/dent/more/000", "ground_truth/dent/more/000_mask"):
        (tmp_path / "raw/widget" / part).parent.mkdir()
    more = trees.save(tmp_path / "raw/widget/test/dent/more/000.png", trees.draw(0))
    mask = tmp_path / "raw/widget/ground_truth/dent/more/000_mask.png"
    written["test/dent/more/000"] = more, trees.save(mask, trees.draw_mask(0))
    trees.save(tmp_path / "raw/widget/train/loose.png", trees.draw(0))
    manual_dir = tmp_path / "raw" / ("widget" if inside else "")
    assert datasets.all_categories("folder", manual_dir, tmp_path / "r") == ["widget"]
    builder = prepare("folder", "widget", manual_dir)
    _check(builder, written, {id_: id_.split("/")[1] for id_ in written})
    (warning,) = log(logging.WARNING)
    assert "skipped" in warning
    for name in ("notes.txt", "train/loose.png"):
        assert name in warning
    assert any("train 4 good; test 3 dent, 2 good, 2 spot" in line for line in log())


def test_folder_without_defects_or_tests(tmp_path, prepare):
    trees.make_mvtec(tmp_path / "raw", "cup", defects={})
    assert {s: i.num_examples for s, i in prepare("folder", "cup").info.splits.items()} == {
        "train": 4,
        "test": 2,
    }
    trees.make_mvtec(tmp_path / "raw", "My plate", defects={}, good=0)
    assert datasets.available("folder", tmp_path / "raw") == ["My plate", "cup"]
    assert list(prepare("folder", "My plate").info.splits) == ["train"]


def test_folder_takes_jpeg_and_grey(tmp_path, prepare):
    written = trees.make_mvtec(tmp_path / "raw", "cup", image_ext="JPG", channels=1)
    builder = prepare("folder", "cup")
    _check(builder, written, {id_: id_.split("/")[1] for id_ in written}, exact=False)
    record = _read(builder, "test")[0]
    expected = tf.io.decode_jpeg(
        (tmp_path / "raw/cup" / f"{record['id'].decode()}.JPG").read_bytes(), channels=3
    )
    np.testing.assert_array_equal(record["image"], expected)


def test_folder_that_holds_nothing(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*none; set data.manual_dir"):
        datasets.all_categories("folder", tmp_path / "none", tmp_path / "r")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match="train/good"):
        datasets.all_categories("folder", tmp_path, tmp_path / "r")
    (tmp_path / "train/good").mkdir(parents=True)
    with pytest.raises(UserError, match="no training images"):
        datasets.prepare("folder", tmp_path.name, manual_dir=tmp_path, data_dir=tmp_path / "r")


@pytest.mark.parametrize("name", ["mvtec_ad", "btad", "dagm2007", "kolektor_sdd2"])
def test_a_missing_folder_names_page_licence_and_field(tmp_path, name):
    builder = datasets.BUILDERS[name]
    category = list(builder.counts)[-1]
    with pytest.raises(UserError) as error:
        datasets.prepare(name, category, manual_dir=tmp_path / "x", data_dir=tmp_path / "r")
    for word in (name, builder.title, builder.page, builder.licence, "data.manual_dir"):
        assert word in str(error.value)
    assert str(tmp_path / "x") in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "r").rglob("*.tfrecord*"))
    assert datasets.available(name, tmp_path / "x") == []


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match="did you mean 'mvtec_ad'"):
        datasets.available("mvtec", "")
    with pytest.raises(UserError, match="did you mean 'bottle'"):
        datasets.prepare("mvtec_ad", "botle", manual_dir="", data_dir="")
    with pytest.raises(UserError, match="there are gravel, brick, grass"):
        datasets.prepare("demo", "x", manual_dir="", data_dir="")


def _truncate(root):
    path = root / "train/good/001.png"
    path.write_bytes(path.read_bytes()[:-60])
    return re.escape(f"{path}: not a readable image")


def _resize_mask(root):
    path = root / "ground_truth/contamination/000_mask.png"
    trees.save(path, trees.draw_mask(0, (12, 15)))
    return f"contamination/000.png is 16x12 .*{re.escape(str(path))} 15x12"


def _orphan_mask(root):
    trees.save(root / "ground_truth/contamination/999_mask.png", trees.draw_mask(0))
    return "999_mask.png: a mask without an image"


def _orphan_folder(root):
    trees.save(root / "ground_truth/cut/000_mask.png", trees.draw_mask(0))
    return "cut/000_mask.png: a mask without an image"


def _no_mask(root):
    (root / "ground_truth/contamination/001_mask.png").unlink()
    return r"contamination/001.png: a defective image without a mask; expected .*001_mask.png"


def _marked_normal(root):
    trees.save(root / "ground_truth/good/000_mask.png", trees.draw_mask(0))
    return "good/000.png is a normal image but its mask"


def _same_stem(root):
    trees.save(root / "train/good/001.jpg", trees.draw(0))
    return "have the same name but for the extension"


@pytest.mark.parametrize(
    "spoil",
    [_truncate, _resize_mask, _orphan_mask, _orphan_folder, _no_mask, _marked_normal, _same_stem],
)
def test_bad_files_are_named_and_leave_nothing(tmp_path, prepare, spoil):
    trees.make_mvtec(tmp_path / "raw")
    message = spoil(tmp_path / "raw/bottle")
    with pytest.raises(UserError, match=message) as error:
        prepare("mvtec_ad", "bottle")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "records").glob("mvtec_ad/bottle/[!.]*"))
    shutil.rmtree(tmp_path / "raw")
    written = trees.make_mvtec(tmp_path / "raw")
    builder = prepare("mvtec_ad", "bottle")
    _check(builder, written, {id_: id_.split("/")[1] for id_ in written})


def test_empty_masks_of_defects_are_reported(tmp_path, prepare, log):
    trees.make_mvtec(tmp_path / "raw")
    path = tmp_path / "raw/bottle/ground_truth/contamination/000_mask.png"
    trees.save(path, np.zeros(trees.SIZE, np.uint8))
    (record,) = [
        record
        for record in _read(prepare("mvtec_ad", "bottle"), "test")
        if record["id"] == b"test/contamination/000"
    ]
    assert record["label"] == 1
    assert any("empty masks" in line and str(path) in line for line in log(logging.WARNING))


def test_records_follow_the_raw_files(tmp_path, prepare, log):
    def times():
        return [p.stat().st_mtime_ns for p in sorted((tmp_path / "records").rglob("*.tfrecord*"))]

    written = trees.make_mvtec(tmp_path / "raw", image_ext="bmp")
    prepare("folder", "bottle")
    before = times()
    prepare("folder", "bottle")
    assert times() == before  # Nothing changed, nothing is written.

    # As many files of the same names and sizes: only their pixels tell.
    path = tmp_path / "raw/bottle/train/good/002.bmp"
    written["train/good/002"] = trees.save(path, trees.draw(99)), np.zeros(trees.SIZE, np.uint8)
    builder = prepare("folder", "bottle")
    _check(builder, written, {id_: id_.split("/")[1] for id_ in written})
    assert times() != before
    assert any("changed" in line for line in log())

    (tmp_path / "raw/bottle/train/good/003.bmp").unlink()
    assert prepare("folder", "bottle").info.splits["train"].num_examples == 3

    shutil.rmtree(tmp_path / "raw")
    assert datasets.available("folder", tmp_path / "raw") == []
    assert datasets.available("folder", tmp_path / "raw", tmp_path / "records") == ["bottle"]
    assert prepare("folder", "bottle").info.splits["train"].num_examples == 3
    with pytest.raises(UserError, match="did you mean 'bottle'"):
        prepare("folder", "bottles")


def test_seen_candidates_are_counted_by_names_where_names_tell(tmp_path):
    trees.make_mvtec(tmp_path / "raw")
    (tmp_path / "raw/bottle/ground_truth/contamination/000_mask.png").unlink()
    assert datasets.count_anomalous("folder", "bottle", tmp_path / "raw") == (5, 4)
    assert datasets.count_anomalous("folder", "bottle", tmp_path / "nowhere") is None
    assert datasets.count_anomalous("demo", "gravel", "") is None
    trees.make_kolektor_sdd2(tmp_path / "kolektor")
    assert datasets.count_anomalous("kolektor_sdd2", "kolektor_sdd2", tmp_path / "kolektor") is None


def test_a_renamed_folder_is_asked_about_and_not_passed_over(tmp_path, prepare):
    trees.make_mvtec(tmp_path / "raw")
    prepare("folder", "bottle")
    (tmp_path / "raw/bottle/train/good").rename(tmp_path / "raw/bottle/train/OK")
    with pytest.raises(UserError, match="train/OK: is this the folder of normal images"):
        prepare("folder", "bottle")


def test_an_unwritable_data_dir_is_named(tmp_path):
    trees.make_mvtec(tmp_path / "raw")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot write .*file.* \(data.data_dir\)"):
        datasets.prepare(
            "mvtec_ad", "bottle", manual_dir=tmp_path / "raw", data_dir=tmp_path / "file"
        )


def test_a_disk_that_is_full_in_tensorflow_is_one_line(tmp_path, monkeypatch, prepare):
    trees.make_mvtec(tmp_path / "raw")

    def write(self, manual_dir):
        raise tf.errors.ResourceExhaustedError(None, None, "bucket.tmp; No space left on device")

    monkeypatch.setattr(datasets.BUILDERS["mvtec_ad"], "_write", write)
    with pytest.raises(UserError, match=r"cannot write .*data_dir\): .*No space left on device"):
        prepare("mvtec_ad", "bottle")


def test_files_that_come_while_others_are_read_are_said(tmp_path, monkeypatch, prepare):
    trees.make_mvtec(tmp_path / "raw")
    builder = datasets.BUILDERS["mvtec_ad"]
    write = builder._write

    def write_later(self, manual_dir):
        trees.save(tmp_path / "raw/bottle/train/good/later.png", trees.draw(0))
        write(self, manual_dir)

    monkeypatch.setattr(builder, "_write", write_later)
    with pytest.raises(UserError, match=r"raw/bottle changed while it was read: run it again"):
        prepare("mvtec_ad", "bottle")


def test_large_sets_are_sorted_part_by_part(tmp_path, monkeypatch, prepare):
    """TFDS holds a part of the records at a time: what has one key's neighbourhood is one part."""
    written = trees.make_mvtec(tmp_path / "raw", train=30)
    parts, number_of = set(), shuffle.get_bucket_number
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 0)
    monkeypatch.setattr(
        shuffle, "get_bucket_number", lambda *x, **y: parts.add(number_of(*x, **y)) or max(parts)
    )
    builder = prepare("mvtec_ad", "bottle")
    assert len(parts) >= 30
    for split in ("train", "test"):
        ids = [record["id"].decode() for record in _read(builder, split)]
        assert ids == sorted(x for x in written if x.startswith(split))


def test_losing_a_race_uses_the_winners_records(tmp_path, monkeypatch, prepare):
    trees.make_mvtec(tmp_path / "raw")
    builder = datasets.BUILDERS["mvtec_ad"]
    write = builder._write

    # On a disk that knows no locks; else they wait for one another.
    monkeypatch.setattr(base, "lock", lambda *_, **__: contextlib.nullcontext(False))

    def write_twice(self, manual_dir):
        monkeypatch.setattr(builder, "_write", write)
        prepare("mvtec_ad", "bottle")  # Another process is faster ...
        raise OSError("Directory not empty")  # ... so that the final rename fails.

    monkeypatch.setattr(builder, "_write", write_twice)
    assert prepare("mvtec_ad", "bottle").info.splits["test"].num_examples == 7


def test_a_rewrite_that_fails_or_is_killed_loses_nothing(tmp_path, monkeypatch, prepare):
    trees.make_mvtec(tmp_path / "raw")
    before = prepare("mvtec_ad", "bottle")
    folder = pathlib.Path(before.data_dir)
    whole = {x.name: x.read_bytes() for x in folder.iterdir()}
    trees.save(tmp_path / "raw/bottle/train/good/999.png", trees.draw(0, (20, 20)))
    builder = datasets.BUILDERS["mvtec_ad"]
    for error in (OSError("no space"), KeyboardInterrupt(), UserError("cut short")):

        def fail(self, manual_dir, error=error):
            raise error

        with monkeypatch.context() as context:
            context.setattr(builder, "_write", fail)
            with pytest.raises((UserError, KeyboardInterrupt)):
                prepare("mvtec_ad", "bottle")
        assert {x.name: x.read_bytes() for x in folder.iterdir()} == whole
        assert {x.name for x in folder.parent.iterdir()} == {folder.name, ".lock"}
    # Killed while it wrote: the old ones are aside, the new ones are unfinished.
    folder.rename(folder.parent / f"before_{folder.name}")
    (folder.parent / f"incomplete.ABC_{folder.name}").mkdir()
    assert prepare("mvtec_ad", "bottle").fingerprint != before.fingerprint
    assert {x.name for x in folder.parent.iterdir()} == {folder.name, ".lock"}
    # Where the raw files are gone since, what was set aside is all there is.
    folder.rename(folder.parent / f"before_{folder.name}")
    shutil.rmtree(tmp_path / "raw")
    assert prepare("mvtec_ad", "bottle").info.splits["test"].num_examples == 7


def test_records_of_an_earlier_reading_are_made_anew(tmp_path, monkeypatch, prepare):
    trees.make_mvtec(tmp_path / "raw")
    monkeypatch.setattr(base, "_READING", 1)
    old = prepare("mvtec_ad", "bottle")
    monkeypatch.undo()
    with monkeypatch.context() as context:  # a folder that is shared read-only

        def refuse(*_, **__):
            raise UserError("cannot write to it")

        context.setattr(base, "lock", refuse)
        assert prepare("mvtec_ad", "bottle").info.metadata["reading"] == 1
    new = prepare("mvtec_ad", "bottle")
    assert new.fingerprint == old.fingerprint
    assert new.info.metadata["reading"] == base._READING != 1


def test_records_that_are_cut_short_are_one_line(tmp_path, prepare):
    trees.make_mvtec(tmp_path / "raw")
    builder = prepare("mvtec_ad", "bottle")
    (shard,) = pathlib.Path(builder.data_dir).glob("*train*")
    shard.write_bytes(shard.read_bytes()[:-100])
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"TFRecords in .*bottle.* cannot be read \(.*remove that folder"
        ):
            splits.read_split(prepare("mvtec_ad", "bottle"), "train", (32, 32))
        shard.unlink(missing_ok=True)


def test_terminal_stays_quiet(tmp_path, prepare, capfd):
    trees.make_mvtec(tmp_path / "raw")
    prepare("folder", "bottle")
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "Generating" not in printed.err


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    trees.make_mvtec(tmp_path / "raw")
    assert datasets.available("mvtec_ad", "~/raw") == ["bottle"]
    datasets.prepare("mvtec_ad", "bottle", manual_dir="~/raw", data_dir="~/records")
    assert (tmp_path / "records/mvtec_ad/bottle").is_dir()


def test_two_children_with_categories_are_ambiguous(tmp_path):
    trees.make_mvtec(tmp_path / "a")
    assert datasets.available("mvtec_ad", tmp_path) == ["bottle"]
    trees.make_mvtec(tmp_path / "b")
    assert datasets.available("mvtec_ad", tmp_path) == []
