"""Files -> verdicts: names, reruns, interruptions, and a fuzz of all of it."""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from prn_jax import evaluate, explain, images, predictions
from prn_jax.errors import UserError
from prn_jax.models.prn import PRN
from prn_jax.tables import Asked
from tests.predicting import Stub, draw, flat, predict, table
from tests.trees import make_mvtec


@pytest.fixture
def folder(tmp_path):
    for number in range(10):
        draw(tmp_path / "images" / f"{number}.png", 25 * number)
    return tmp_path / "images"


def test_a_second_call_does_only_what_is_new_and_reads_no_picture_of_the_first(folder):
    output = folder / "predictions"
    first = Stub()
    rows = predict(folder, output, first)
    assert [row["verdict"] for row in rows] == ["normal"] * 6 + ["anomalous"] * 4
    assert first.calls == 10
    draw(folder / "3.png", 250, size=(6, 6))
    draw(folder / "new.png", 10)
    second = Stub()
    rows = predict(folder, output, second)
    assert second.calls == 2
    assert len(rows) == 11
    assert rows[3]["verdict"] == "anomalous"
    assert [row["image"] for row in table(output)] == [row["image"] for row in rows]
    # Another threshold is a matter of the tables alone, another network is not.
    third = Stub()
    assert {row["verdict"] for row in predict(folder, output, third, threshold=2.0)} == {"normal"}
    assert third.calls == 0
    fourth = Stub(digest="two")
    predict(folder, output, fourth)
    assert fourth.calls == 11


def test_what_is_replaced_while_it_is_computed_is_done_again(folder, tmp_path):
    class Slow(Stub):
        def inspect(self, images, batch_size, fill=False):
            draw(folder / "3.png", 250, size=(6, 6))
            return super().inspect(images, batch_size, fill)

    predict(folder, tmp_path / "out", Slow())
    again = Stub()
    assert predict(folder, tmp_path / "out", again)[3]["verdict"] == "anomalous"
    assert again.calls == 1


def test_a_camera_without_a_clock_repeats_no_verdict(folder, tmp_path):
    draw(folder / "3.bmp", 10)
    os.utime(folder / "3.bmp", ns=(0, 0))
    predict(folder, tmp_path / "out", Stub())
    draw(folder / "3.bmp", 250)
    os.utime(folder / "3.bmp", ns=(0, 0))
    again = Stub()
    (row,) = [x for x in predict(folder, tmp_path / "out", again) if "3.bmp" in x["image"]]
    assert (row["verdict"], again.calls) == ("anomalous", 1)


def test_levels_are_read_by_the_white_of_the_training(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((5, 4), 1000, np.uint16)).save(tmp_path / "in/a.png")
    (row,) = predict(tmp_path / "in", tmp_path / "out", Stub(white_level=4095))
    assert row["score"] == pytest.approx(1000 / 4095, abs=1 / 255)  # by a guess near 1


def test_a_table_names_files_as_they_are_named_now(folder, tmp_path, monkeypatch):
    predict(folder, tmp_path / "out", Stub())
    monkeypatch.chdir(folder)
    rows = predict(".", tmp_path / "out", again := Stub())
    assert again.calls == 0
    assert all(pathlib.Path(row["image"]).exists() for row in rows)


def test_tables_of_an_earlier_call_are_not_called_skipped(folder, caplog):
    predict(folder, folder / "predictions", Stub())
    (folder / "notes.txt").write_text("mine")
    predictions.find([str(folder)])
    (said,) = [x.getMessage() for x in caplog.records if "skipped" in x.getMessage()]
    assert "notes.txt" in said
    assert "predictions.csv" not in said


def test_pictures_that_were_left_out_are_made_when_asked_for(folder, tmp_path):
    output = tmp_path / "out"
    predict(folder, output, Stub(), pictures=False)
    assert not list(output.rglob("*.png"))
    again = Stub()
    predict(folder, output, again)
    assert again.calls == 10
    assert len(list(output.rglob("*.png"))) == 20
    assert all(images.is_prediction(path) for path in output.rglob("*.png"))


def test_what_was_done_before_an_interruption_is_in_the_table(folder, tmp_path):
    output = tmp_path / "out"
    predict(folder, output, Stub(digest="earlier"))
    with pytest.raises(KeyboardInterrupt):
        predict(folder, output, Stub(stop_after=6), batch_size=3)
    assert [pathlib.Path(row["image"]).name for row in table(output)] == [
        f"{number}.png" for number in range(6)
    ]
    assert not (output / "predictions.json").exists()  # it would be an earlier call's
    # As a kill leaves it: the last line is cut.
    with (output / "predictions.jsonl").open("a") as file:
        file.write('{"image": "9.p')
    rest = Stub()
    rows = predict(folder, output, rest, batch_size=3)
    assert rest.calls == 4
    whole = predict(folder, tmp_path / "whole", Stub())
    assert rows == whole


def test_pictures_of_equal_names_do_not_meet(tmp_path):
    for name in ("a.png", "a.jpg", "a_2.png", "sub/a.png", "b [2].png", "x" * 240 + ".png"):
        draw(tmp_path / "in" / name, 9)
    names = predictions.find([str(tmp_path / "in")])
    assert len(names) == len(set(names.values())) == 6
    rows = predict(tmp_path / "in", tmp_path / "out", Stub())
    assert len(rows) == 6
    assert len(list((tmp_path / "out").rglob("*.png"))) == 12


def test_patterns_folders_and_files(tmp_path, capsys):
    draw(tmp_path / "a.png", 1)
    draw(tmp_path / "b.webp", 1)
    (tmp_path / "c.txt").write_text("x")
    (tmp_path / ".d.png").write_text("x")
    found = predictions.find([str(tmp_path / "*"), str(tmp_path), str(tmp_path / "a.png")])
    assert [path.name for path in found] == ["a.png", "b.webp"]
    assert list(predictions.find([str(tmp_path / "c.txt")])) == [tmp_path / "c.txt"]
    with pytest.raises(UserError, match=r"nothing\*: there are no images"):
        predictions.find([str(tmp_path / "nothing*")])
    with pytest.raises(UserError, match=r"no images; skipped 1 no type of image .*: .*c.txt"):
        predictions.find([str(tmp_path / "c*")])
    with pytest.raises(UserError, match="lost.png: no such file or folder"):
        predictions.find([str(tmp_path / "lost.png")])
    with pytest.raises(UserError, match="no images given"):
        predictions.find([])


def test_of_a_product_s_folder_masks_and_region_are_no_images(tmp_path, caplog):
    make_mvtec(tmp_path / "raw", "bolt", defects={"dent": 2})
    draw(tmp_path / "raw/bolt/roi.png", 255)
    draw(tmp_path / "ground_truth/0.png", 255)  # nobody's
    found = predictions.find([str(tmp_path)])
    assert len(found) == 4 + 2 + 2 + 1
    assert "skipped 3 out of place: " in caplog.text
    assert list(predictions.find([str(tmp_path / "raw/bolt/roi.png")]))  # as it is named


def test_rows_that_leave_the_tables_are_said(folder, tmp_path, caplog, monkeypatch):
    predict(folder, tmp_path / "out", Stub())
    assert "had rows of" not in caplog.text
    rows = predict(folder / "3.png", tmp_path / "out", Stub())
    assert len(rows) == 1
    assert "had rows of 9 images that are not among these" in caplog.text
    predict(folder, tmp_path / "all", Stub())
    caplog.clear()
    monkeypatch.chdir(folder)
    predict(".", tmp_path / "all", again := Stub())  # as it is called from here
    assert again.calls == 0
    assert "had rows of" not in caplog.text


def test_an_output_that_cannot_be_written_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write to --output=.*file"):
        predict(folder, tmp_path / "file", Stub())
    with pytest.raises(UserError, match="--output=gs://bucket/x: .* to a local folder"):
        predictions.prepare("gs://bucket/x")


def test_a_file_of_which_a_share_says_nothing_is_one_error(folder, tmp_path, monkeypatch):
    stat = os.stat

    def fail(path, *more, **options):
        if os.fspath(path).endswith("3.png"):
            raise OSError(116, "Stale file handle")
        return stat(path, *more, **options)

    monkeypatch.setattr(os, "stat", fail)
    rows = predict(folder, tmp_path / "out", Stub())
    assert [bool(row["error"]) for row in rows] == [number == 3 for number in range(10)]
    assert "Stale file handle" in rows[3]["error"]


# --- what one can work with -----------------------------------------------------------------------


def test_an_alarm_is_explained_by_the_normal_image_most_like_it(folder, tmp_path):
    levels = [10, 120, 240]
    pictured = np.array([np.full((8, 6, 3), x, np.uint8) for x in levels])
    made = explain.Normals.of(["dark", "grey", "ü"], pictured, np.float32(levels)[:, None])
    made.write(tmp_path)
    normals = explain.read(tmp_path)
    assert normals.id == made.id
    assert np.abs(normals.picture(2).astype(int) - 240).max() < 5
    output, stub = tmp_path / "out", Stub()
    asked = {"normals": normals, "explain": True, "distance": 0.8}
    rows = predict(folder, output, stub, **asked)
    # Anomalous from a level of 127 on, unfamiliar from one of 102.
    assert [row["unfamiliar"] for row in rows] == ["no"] * 5 + ["yes"] * 5
    assert [row["nearest"] for row in rows] == [""] * 5 + ["grey"] * 3 + ["ü"] * 2
    assert len(list(output.glob("*_why.png"))) == 5
    assert predict(folder, output, stub, **asked) == rows
    assert stub.calls == 10
    # What is an alarm only now is explained now.
    rows = predict(folder, output, stub, **asked | {"threshold": 0.35})
    assert [row["nearest"] for row in rows][3:5] == ["", "grey"]
    # A call that asks for something else in between loses nothing of it.
    predict(folder, tmp_path / "out", Stub(), maps="tiff", threshold=0.35)
    again = predict(folder, tmp_path / "out", Stub(), **asked | {"threshold": 0.35})
    assert [row["nearest"] for row in again] == [row["nearest"] for row in rows]
    assert stub.calls == 11
    with pytest.raises(UserError, match=r"normals.npz is missing or damaged"):
        explain.read(tmp_path / "elsewhere")
    whole = (tmp_path / explain.NAME).read_bytes()
    for damaged in (b"", whole[:-9], whole[: len(whole) // 2]):
        (tmp_path / explain.NAME).write_bytes(damaged)
        with pytest.raises(UserError, match=r"normals.npz is missing or damaged"):
            explain.read(tmp_path)


def test_what_no_prediction_wrote_is_never_replaced(folder, tmp_path):
    (tmp_path / "mine.png").write_bytes((folder / "3.png").read_bytes())
    for ending, asked in {
        "_heat.png": {}, "_mask.png": {"pixel_threshold": 0.5}, "_why.png": {"explain": True},
        ".tiff": {"maps": "tiff"}, "_map.npy": {"maps": "npy"},
    }.items():  # fmt: skip
        output, stub = tmp_path / f"out{ending}", Stub()
        output.mkdir()
        theirs = shutil.copy(tmp_path / "mine.png", output / f"3{ending}")
        with pytest.raises(UserError, match=rf"3{ending} would be replaced.*another --output"):
            predict(folder, output, stub, **asked)
        assert stub.calls == 0
        assert pathlib.Path(theirs).read_bytes() == (tmp_path / "mine.png").read_bytes()
        assert not (output / "predictions.csv").exists()
    for name in ("predictions.csv", "predictions.json", "predictions.jsonl"):
        output = tmp_path / f"tables {name}"
        output.mkdir()
        (output / name).write_text('{"image": "mine"}\n')
        with pytest.raises(UserError, match=rf"{name} would be replaced"):
            predictions.prepare(output)
        assert [x.name for x in output.iterdir()] == [name]
    # An empty file is what a power cut leaves.
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "3_heat.png").write_bytes(b"")
    # What an earlier one wrote is, of another checkpoint's too.
    for digest in ("one", "two"):
        for maps in ("tiff", "npy"):
            stub = Stub(digest=digest)
            predict(folder, tmp_path / "again", stub, maps=maps, pixel_threshold=0.5)
            assert stub.calls == 10
        for maps in ("tiff", "npy"):  # both are there now
            predict(folder, tmp_path / "again", stub, maps=maps, pixel_threshold=0.5)
        assert stub.calls == 10


def test_a_name_that_begins_with_a_tilde_is_a_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    draw(folder / "~new.png", 200)
    assert "~new" in predictions.find(["~new.png", "1.png"]).values()
    assert predictions.prepare("~out").name == "~out"


# --- fuzz -----------------------------------------------------------------------------------------

_ODD = [
    "a",
    "ü",
    "中",
    " ",
    "[2]",
    "*",
    "\n",
    "%",
    "'",
    '"',
    "..x",
    "._",
    "\udce8",
    "heat",
    "x" * 90,
]
_NAMES = st.lists(st.sampled_from(_ODD), min_size=1, max_size=3).map("".join)
_ENDINGS = st.sampled_from([".png", ".jpg", ".bmp", ".tif", ".webp", ".pgm", ".PNG", ".txt", ""])
_KINDS = st.sampled_from(["L", "RGB", "RGBA", "P", "1", "I;16", "cut", "empty", "text", "link"])
_FILES = st.tuples(st.booleans(), _NAMES, _ENDINGS, _KINDS, st.integers(1, 9), st.integers(1, 9))


def make(root, nested, name, ending, kind, height, width):
    """One file of a tree, as far as its name and type go together."""
    folder = root / "deeper [2]" if nested else root
    folder.mkdir(exist_ok=True)
    path = folder / (name + ending)
    if path.name in (".", "..") or os.path.lexists(path) or len(os.fsencode(path.name)) > 255:
        return
    if kind == "link":
        path.symlink_to(folder / "nowhere")
        return
    levels = np.arange(height * width).reshape(height, width)
    modes = {"I;16": np.uint16(levels * 37)}
    image = Image.fromarray(modes.get(kind, np.uint8(levels)))
    if kind in ("RGB", "RGBA", "P", "1"):
        image = image.convert(kind)
    try:
        image.save(path)
    except (OSError, ValueError, KeyError):  # this type does not hold this mode, or is none
        path.write_bytes(b"no image")
    if kind in ("cut", "empty", "text"):
        content = {"cut": path.read_bytes()[:-9], "empty": b"", "text": b"hello"}[kind]
        path.write_bytes(content)


def named(output, stub, *paths, batch_size=16, **asked):
    """A prediction of files as a shell lists them."""
    names = predictions.find([str(path) for path in paths])
    output = predictions.prepare(output)
    return predictions.predict_files(stub, names, output, Asked(**asked), batch_size=batch_size)


@pytest.mark.parametrize("output", [".", "predictions"])
@pytest.mark.parametrize("with_pictures", [True, False])
def test_what_a_shell_lists_may_hold_an_earlier_prediction(folder, output, with_pictures):
    for calls in (10, 0, 0):
        stub = Stub()
        rows = named(folder / output, stub, *folder.iterdir(), pictures=with_pictures)
        assert (len(rows), stub.calls) == (10, calls)
    with pytest.raises(UserError, match="there are no images; .*left out"):
        named(folder / "other", Stub(), *folder.rglob("predictions.*"))


def test_each_picture_shows_its_own_image(tmp_path):
    """Whatever was predicted in between: two images whose pictures would have one name."""
    draw(tmp_path / "a/x.jpg", 200)
    draw(tmp_path / "b/x.png", 50)
    a, b, output = tmp_path / "a", tmp_path / "b", tmp_path / "out"

    def level(name):
        with Image.open(output / f"{name}_overlay.png") as picture:
            return np.asarray(picture).tolist()

    named(output, Stub(), b)
    dark = level("x")
    named(output, Stub(), a, b)
    bright = level("x")
    assert level("x_2") == dark != bright
    named(output, Stub(), b)
    assert level("x") == dark
    (output / "x_heat.png").unlink()
    again = Stub()
    named(output, again, b)
    assert again.calls == 1
    assert (output / "x_heat.png").exists()


def test_brackets_in_a_folder_are_no_pattern_and_any_line_end_stays_in_its_row(tmp_path):
    names = ["a\rb.png", "c\nd.png", "e.png"]
    for name in names:
        draw(tmp_path / "box[2]" / name, 10)
    named(tmp_path, Stub(), tmp_path / "box[2]" / "*.png")
    assert [pathlib.Path(row["image"]).name for row in table(tmp_path)] == names


def test_a_tail_and_unreadable_files_are_computed_in_the_same_size(folder, monkeypatch):
    (folder / "3.png").write_bytes(b"cut")
    stub = Stub()
    named(folder / "out", stub, folder, batch_size=4)
    assert stub.sizes == [4, 4, 4]
    # The step itself, with any number of images at all.
    shapes = set()

    def step(variables, images):
        shapes.add(len(images))
        first = images[:, 0, 0, 0].astype(np.float32)
        return images[..., 0].astype(np.float32), first, first

    monkeypatch.setattr(evaluate, "make_eval_step", lambda *_: step)
    for count in range(1, 40):
        images = np.full((count, 2, 2, 3), np.arange(count)[:, None, None, None], np.uint8)
        _, scores, _ = evaluate.predict(PRN(), None, images, stub.mesh, batch_size=32)
        assert scores.tolist() == list(range(count))
    assert shapes == {1, 4, 16, 32}


def listing(root):
    return {
        os.fsencode(path): "" if not path.is_file() else hashlib.sha256(path.read_bytes()).digest()
        for path in root.rglob("*")
    }


# PRN_FUZZ=1000 tries a thousand trees.
@settings(
    max_examples=int(os.environ.get("PRN_FUZZ", "60")), deadline=None, derandomize=True,
    database=None, suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.lists(_FILES, max_size=8))
def test_any_tree_is_predicted_or_refused_in_one_line(files):
    with tempfile.TemporaryDirectory() as root:
        inside, output = pathlib.Path(root, "in"), pathlib.Path(root, "out")
        inside.mkdir()
        for file in files:
            make(inside, *file)
        before = listing(inside)
        # Nothing but the name says what is taken for an image.
        wanted = sorted(
            os.fsencode(path)
            for path in (x for x in inside.rglob("*") if not x.is_dir())
            if path.suffix.lower() in {".png", ".jpg", ".bmp", ".tif", ".webp", ".pgm"}
            and not path.name.startswith(".")
        )
        try:
            rows = predict(inside, output, Stub(), batch_size=3)
        except UserError as error:
            rows, message = None, str(error)
        assert listing(inside) == before
        if rows is None:
            assert not wanted
            assert "there are no images" in message
            assert "\n" not in message
            return
        assert len(rows) == len(wanted)
        escaped = sorted(x.decode("utf-8", "backslashreplace") for x in wanted)
        assert sorted(row["image"] for row in rows) == escaped
        assert table(output) == [flat(row) for row in rows]
        assert json.loads((output / "predictions.json").read_text()) == rows
        for row in rows:
            assert bool(row["error"]) != bool(row["verdict"])
            assert "\n" not in row["error"]
        again = Stub()
        assert predict(inside, output, again) == rows
        assert again.calls == 0
