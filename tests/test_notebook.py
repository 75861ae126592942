"""docs/demo.ipynb does what it says."""

import json

import pytest
from PIL import Image

from tests import tiny
from tests.processes import ROOT


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    notebook = json.loads((ROOT / "docs/demo.ipynb").read_text("utf-8"))
    cells = ["".join(x["source"]) for x in notebook["cells"] if x["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    tiny.register()
    names = {}
    pictures = []
    for cell in cells:
        if cell.startswith("%pip"):
            continue
        # What a cell ends with is shown.
        body, _, last = cell.rpartition("\n")
        exec(body, names)
        if last.startswith(("Image.", "preview.")):
            pictures.append(eval(last, names))
        else:
            exec(last, names)
        if "config = demo.get_config()" in cell:
            with names["config"].ignore_type():
                names["config"].update_from_flattened_dict(tiny.FIELDS | {"total_steps": 1})
    assert len(pictures) == 3
    assert all(isinstance(x, Image.Image) and x.width >= 128 for x in pictures)
    assert names["metrics"].keys() == {"gravel"}
    assert len(names["scores"]) == 4
