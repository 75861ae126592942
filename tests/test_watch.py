"""A folder that is written to: each image once, and none before it is complete."""

import contextlib
import itertools
import json
import logging
import os
import pathlib
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import prn_jax
from prn_jax import images, pictures, watch
from prn_jax.errors import UserError
from prn_jax.images import read_array
from prn_jax.predict import Inspection
from prn_jax.tables import Asked
from tests import processes


class Over(Exception):
    """The scenario has come to its end."""


def watched(folder, *events, existing=False):
    """The images that are yielded, with the number of the look at which each was."""
    looks = itertools.count(1)
    happened = iter(events)
    now = 0

    def sleep(_):
        nonlocal now
        now = next(looks)
        event = next(happened, None)
        if event is None:
            raise Over
        event()

    found = []
    with contextlib.suppress(Over):
        for path in watch.new_images(folder, existing=existing, sleep=sleep):
            found.append((path.name, now))
    return found


def picture(path, level=0):
    Image.fromarray(np.full((9, 7, 3), level, np.uint8)).save(path, format="PNG")


def nothing():
    pass


def test_an_image_is_yielded_once_it_is_complete(tmp_path):
    picture(tmp_path / "old.png")
    picture(tmp_path / ".whole")
    whole = (tmp_path / ".whole").read_bytes()
    half = tmp_path / "Ü 划痕.png"
    found = watched(
        tmp_path,
        lambda: half.write_bytes(b""),
        lambda: half.write_bytes(whole[:40]),
        lambda: half.write_bytes(whole),
        nothing,
        nothing,
        lambda: (tmp_path / "notes.txt").write_text("no image"),
        nothing,
        lambda: picture(half, level=200),
        nothing,
        nothing,
    )
    # Complete at the third look, unchanged at the fourth; written anew at the eighth.
    assert found == [(half.name, 4), (half.name, 9)]


def test_pictures_of_a_prediction_are_no_images(tmp_path):
    (tmp_path / "out").mkdir()
    image = Image.new("RGB", (9, 7))

    def predict():
        pictures.save_png(tmp_path / "out/a_heat.png", image, is_prediction=True)
        picture(tmp_path / "b.png")

    assert watched(tmp_path, predict, nothing, nothing) == [("b.png", 2)]


def test_a_folder_that_may_not_be_read_stops_no_other(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, logger="absl")
    (tmp_path / "sub").mkdir()
    picture(tmp_path / "sub/old.png")
    original, may_be_read = images._identity, True

    def identity(folder):
        if folder.name == "sub" and not may_be_read:
            raise PermissionError(13, "Permission denied")
        return original(folder)

    def close():
        nonlocal may_be_read
        may_be_read = False
        picture(tmp_path / "new.png")

    def reopen():
        nonlocal may_be_read
        may_be_read = True

    monkeypatch.setattr(images, "_identity", identity)
    found = watched(tmp_path, close, nothing, nothing, reopen, nothing, nothing)
    assert found == [("new.png", 2)]  # and the old one is no new one when it is back
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{tmp_path}/sub cannot be read: waiting", "the folder is back"]


def test_a_link_or_other_rights_make_no_new_image(tmp_path):
    picture(tmp_path / "a.png")
    found = watched(
        tmp_path,
        lambda: (tmp_path / "a.png").chmod(0o600),
        lambda: os.link(tmp_path / "a.png", tmp_path / "archived"),
        nothing,
        nothing,
        existing=True,
    )
    assert [name for name, _ in found] == ["a.png"]


def test_what_is_there_already_is_judged_when_asked_for(tmp_path):
    picture(tmp_path / "old.png")
    assert watched(tmp_path, nothing, nothing, nothing) == []
    assert watched(tmp_path, nothing, nothing, nothing, existing=True) == [("old.png", 1)]


def test_a_verdict_is_json_and_an_unreadable_file_an_error(tmp_path):
    def inspect(path):
        values = read_array(path).mean(-1).astype(np.float32) / 255
        return Inspection(values, values.max(), np.float32(7.0))

    image = np.zeros((9, 7, 3), np.uint8)
    image[4, 5] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    found = json.loads(json.dumps(watch.verdict(inspect, tmp_path / "a.png", Asked(0.5, 0.9, 8.0))))
    assert (found["verdict"], found["row"], found["column"], found["score"]) == (
        "anomalous", 4, 5, 1.0,
    )  # fmt: skip
    assert found["unfamiliar"] == "no"
    assert [x["area"] for x in found["regions"]] == [1]
    assert watch.verdict(inspect, tmp_path / "a.png", Asked())["verdict"] == ""
    # From its threshold on, so at it as well.
    at = watch.verdict(inspect, tmp_path / "a.png", Asked(1.0, 1.0, 7.0))
    assert (at["verdict"], at["unfamiliar"]) == ("anomalous", "yes")
    assert [x["area"] for x in at["regions"]] == [1]
    assert Asked(threshold=1.0).alarms({"score": 1.0, "distance": 0.0})
    (tmp_path / "b.png").write_bytes(b"no image")
    assert "b.png" in watch.verdict(inspect, tmp_path / "b.png", Asked(0.5))["error"]
    with pytest.raises(UserError):
        inspect(tmp_path / "b.png")


def test_what_comes_before_the_first_look_is_new(tmp_path):
    picture(tmp_path / "old.png")
    arrivals = watch.new_images(tmp_path, sleep=lambda _: None)
    picture(tmp_path / "~meanwhile.png")  # a network is being read
    assert next(arrivals).name == "~meanwhile.png"


def test_a_day_that_is_cleaned_away_while_it_is_listed_ends_nothing(tmp_path, monkeypatch):
    picture(tmp_path / "kept.png")
    (tmp_path / "monday").mkdir()
    listed = pathlib.Path.iterdir

    def iterdir(path):
        if path.name == "monday":
            path.rmdir()
        return listed(path)

    monkeypatch.setattr(pathlib.Path, "iterdir", iterdir)
    assert watched(tmp_path, nothing, existing=True) == [("kept.png", 1)]


def test_a_folder_that_is_away_for_a_while_is_waited_for(tmp_path, caplog):
    folder, away = tmp_path / "camera", tmp_path / "away"
    folder.mkdir()
    picture(folder / "old.png")
    found = watched(
        folder,
        nothing,
        lambda: folder.rename(away),
        lambda: folder.mkdir(),  # the mount point, with nothing on it
        lambda: (folder.rmdir(), away.rename(folder)),
        lambda: picture(folder / "new.png"),
        nothing,
        existing=True,
    )
    assert found == [("old.png", 1), ("new.png", 6)]
    assert "camera is away: waiting" in caplog.text
    assert "the folder is back" in caplog.text


def test_a_folder_in_it_that_was_away_brings_nothing_old(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_REMEMBERED", 2)
    for name in ("line_1", "line_2"):
        (tmp_path / name).mkdir()
    for path in ("line_1/a.png", "line_2/b.png"):
        picture(tmp_path / path)
    away = tmp_path.parent / f"{tmp_path.name}_away"
    found = watched(
        tmp_path,
        nothing,
        lambda: (tmp_path / "line_1").rename(away),
        nothing,
        lambda: away.rename(tmp_path / "line_1"),
        lambda: picture(tmp_path / "line_1/c.png"),
        nothing,
        lambda: (tmp_path / "line_1").rename(away),  # of more than two images, one is forgotten
        lambda: picture(tmp_path / "line_1_more.png"),
        lambda: picture(away / "d.png"),
        lambda: away.rename(tmp_path / "line_1"),
        nothing,
        existing=True,
    )
    assert found[:3] == [("a.png", 1), ("b.png", 1), ("c.png", 6)]
    assert sorted(found[3:]) == [("d.png", 11), ("line_1_more.png", 9)]


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), UserError("denied")])
def test_a_share_that_hiccups_ends_nothing(tmp_path, monkeypatch, caplog, error):
    picture(tmp_path / "old.png")
    find, calls = watch.images.find_images, itertools.count()

    def hiccup(folder, **options):
        if next(calls) in (2, 3):
            raise error
        return find(folder)

    monkeypatch.setattr(watch.images, "find_images", hiccup)
    found = watched(tmp_path, nothing, lambda: picture(tmp_path / "new.png"), *[nothing] * 4)
    assert found == [("new.png", 4)]
    assert caplog.text.count("waiting") == 1


def test_what_is_written_anew_while_others_are_judged_is_not_read_half(tmp_path):
    for name in ("1.png", "2.png"):
        picture(tmp_path / name)
    whole, rest = (tmp_path / "2.png").read_bytes(), []

    def sleep(_):
        if rest:
            other.write_bytes(rest.pop())

    arrivals = watch.new_images(tmp_path, existing=True, sleep=sleep)
    first = next(arrivals)
    other = tmp_path / ("2.png" if first.name == "1.png" else "1.png")
    other.write_bytes(whole[:50])
    rest.append(whole)
    assert next(arrivals) == other
    assert other.read_bytes() == whole


@pytest.mark.slow
def test_a_line_s_program_reads_verdicts_until_it_wants_no_more(trained, tmp_path):
    folder = tmp_path / "camera [1]"
    folder.mkdir()
    picture(folder / "Ü 1.png")
    (folder / "2.png").write_bytes(b"no image")
    process = processes.start(
        [sys.executable, "launch/watch.py", str(folder), f"--checkpoint={trained}",
         "--existing", "--every=0.1"]
    )  # fmt: skip
    timer = threading.Timer(240, process.kill)
    timer.start()
    rows = [json.loads(process.stdout.readline()) for _ in range(2)]
    picture(folder / "3.png", level=200)
    rows.append(json.loads(process.stdout.readline()))
    process.stdout.close()
    picture(folder / "4.png")
    errors = process.stderr.read()
    status = process.wait()
    timer.cancel()
    assert status == 0, errors
    assert "Traceback" not in errors
    assert rows[2]["image"] == str(folder / "3.png")
    found = {pathlib.Path(row["image"]).name: row for row in rows}
    assert found.keys() == {"Ü 1.png", "2.png", "3.png"}
    assert "not a readable image" in found["2.png"]["error"]
    _, scores = prn_jax.load(trained)([folder / "Ü 1.png", folder / "3.png"])
    given = [found[name]["score"] for name in ("Ü 1.png", "3.png")]
    np.testing.assert_allclose(given, scores, atol=1e-6)
