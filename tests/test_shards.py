"""Parts of a prediction: nothing twice, nothing left out, and the tables joined."""

import csv
import json
import pathlib
import shutil

import pytest

from prn_jax import predictions, shards, tables
from prn_jax.errors import UserError
from prn_jax.tables import Asked
from tests.predicting import Stub, draw, predict


def test_each_file_is_in_one_part_whatever_else_is_there():
    names = {pathlib.Path(f"/data/Ü {i}.png"): f"Ü {i}" for i in range(400)}
    renamed = {path: f"{name}_2" for path, name in names.items()}  # another image has its name now
    assert shards.select(renamed, 3, 8).keys() == shards.select(names, 3, 8).keys()
    parts = [shards.select(names, number, 8) for number in range(1, 9)]
    assert sum(map(len, parts)) == len(names)
    assert {path for part in parts for path in part} == names.keys()
    assert all(20 < len(part) < 80 for part in parts)
    fewer = {path: name for path, name in list(names.items())[::2]}
    assert shards.select(fewer, 3, 8) == {x: y for x, y in parts[2].items() if x in fewer}


@pytest.mark.parametrize("text", ["0/8", "9/8", "2", "a/b", "-1/2", "1/0"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(UserError, match=f"--shard={text}"):
        shards.parse(text)
    assert shards.parse("2/8") == (2, 8)


def write(part, images, **made_by):
    part.mkdir(parents=True, exist_ok=True)
    rows = [dict.fromkeys(tables.FIELDS, "") | {"image": x, "score": 0.5} for x in images]
    (part / "predictions.jsonl").write_text(json.dumps({"checkpoint": "a"} | made_by) + "\n")
    (part / "predictions.json").write_text(json.dumps(rows))


def test_the_last_part_joins_the_tables(tmp_path):
    write(shards.folder(tmp_path, 1, 2), ["b, c.png", "划痕.png"])
    assert "1 of 2 parts are done, not 2;" in shards.join(tmp_path, 2)
    assert not (tmp_path / "predictions.csv").exists()
    write(shards.folder(tmp_path, 2, 2), ["a.png"], checkpoint="b")
    assert "several checkpoints" in shards.join(tmp_path, 2)
    write(shards.folder(tmp_path, 2, 2), ["a.png"])
    assert "all 2 parts are done" in shards.join(tmp_path, 2)
    joined = [row["image"] for row in json.loads((tmp_path / "predictions.json").read_text())]
    assert joined == ["a.png", "b, c.png", "划痕.png"]
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == joined
    write(shards.folder(tmp_path, 2, 2), ["a.png"], threshold=0.6)
    assert "several checkpoints or thresholds" in shards.join(tmp_path, 2)
    (shards.folder(tmp_path, 2, 2) / "predictions.json").unlink()
    assert "not 2;" in shards.join(tmp_path, 2)


def test_tables_that_no_prediction_wrote_are_not_joined_over(tmp_path):
    (tmp_path / "predictions.csv").write_text("mine")
    with pytest.raises(UserError, match=r"predictions.csv would be replaced"):
        tables.check_free(tmp_path)
    write(shards.folder(tmp_path, 1, 1), ["a.png"])
    tables.check_free(tmp_path)  # an earlier version joined them, and left no more
    assert "all 1 parts are done" in shards.join(tmp_path, 1)
    shutil.rmtree(shards.folder(tmp_path, 1, 1))
    tables.check_free(tmp_path)


def test_parts_together_are_the_whole(tmp_path):
    for number in range(6):
        draw(tmp_path / f"in/{number}.png", 40 * number)
    names = predictions.find([str(tmp_path / "in")])
    for number in range(1, 17):  # some of them without a file
        part = predictions.prepare(shards.folder(tmp_path / "out", number, 16))
        share = shards.select(names, number, 16)
        predictions.predict_files(Stub(), share, part, Asked(threshold=0.5))
        said = shards.join(tmp_path / "out", 16)
    assert "16 parts" in said
    joined = json.loads((tmp_path / "out/predictions.json").read_text())
    for row in joined:
        assert (tmp_path / "out" / f"{row['pictures']}_overlay.png").exists()
    whole = predict(tmp_path / "in", tmp_path / "whole", Stub())
    assert {x["image"]: x["score"] for x in joined} == {x["image"]: x["score"] for x in whole}
