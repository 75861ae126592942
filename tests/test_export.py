"""Where exports go, and that nothing else is lost there."""

import os
import pathlib
import subprocess
import sys

import pytest

from prn_jax import export, predictions
from prn_jax.errors import UserError
from prn_jax.export import place

FOLDERS = ("savedmodel", "openvino")
ROOT = pathlib.Path(__file__).resolve().parent.parent


def tree(folder):
    """Everything below a folder, with its content or where it leads."""
    return {
        path.relative_to(folder): os.readlink(path) if path.is_symlink()
        else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }  # fmt: skip


def make(folder, kind, text="network"):
    """What a format leaves to be put in its place."""
    made = folder / f"made_{kind}_{text}"
    if kind in FOLDERS:
        (made / "variables").mkdir(parents=True)
        (made / "saved_model.pb").write_text(text)
    else:
        made.write_text(text)
    golden = folder / f"golden_{kind}_{text}"
    golden.mkdir()
    (golden / "expected.json").write_text(text)
    return made, golden


def occupy(there, what):
    """Puts something at `there` that is not ours; a run is what was once deleted."""
    there.parent.mkdir(exist_ok=True)
    if what == "run":
        (there / "checkpoints" / "100").mkdir(parents=True)
        (there / "checkpoints" / "100" / "model").write_text("weights")
    elif what == "empty folder":
        there.mkdir()
    elif what == "file":
        there.write_text("mine")
    elif what == "link":
        (there.parent / "target").write_text("mine")
        there.symlink_to("target")
    elif what == "dangling link":
        there.symlink_to("nowhere")
    elif what == "golden":
        (there.parent / f"{there.name}.golden").mkdir()
        (there.parent / f"{there.name}.golden" / "0.png").write_text("mine")
    elif what == "results":  # `--output=.../results`: the description would replace a run's
        (there.parent / f"{there.name}.json").write_text('{"metrics": {}}')


@pytest.mark.parametrize("kind", export.FORMATS)
@pytest.mark.parametrize(
    "what", ["run", "empty folder", "file", "link", "dangling link", "golden", "results"]
)
def test_what_is_no_export_stays(kind, what, tmp_path):
    there = tmp_path / "out" / "bolt[2]"
    occupy(there, what)
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match=r"bolt\[2\].*nothing was changed"):
        export.prepare(kind, there)
    with pytest.raises(UserError, match="nothing was changed"):
        place.put(*make(tmp_path, kind), there, kind, {})
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("kind", "which"), [("savedmodel", "savedmodel"), ("onnx", "onnx"), ("onnx", "golden")]
)
def test_an_earlier_export_is_replaced_only_as_it_was_left(kind, which, tmp_path):
    there = tmp_path / "deep" / os.fsdecode(b"pi\xe8ce [2]") / "bolt"
    for text in ("first", "second"):
        place.put(*make(tmp_path, kind, text), there, kind, {"category": "bolt"})
        file = there / "saved_model.pb" if kind in FOLDERS else there
        assert file.read_text() == text
        assert (there.parent / "bolt.golden/expected.json").read_text() == text
        assert sorted(x.name for x in there.parent.iterdir()) == [
            "bolt", "bolt.golden", "bolt.json"
        ]  # fmt: skip
    before = tree(there.parent)
    with pytest.raises(UserError, match=f"format {kind}, not stablehlo"):
        place.check(there, "stablehlo")
    # Somebody's note in a folder, or a file that was worked on.
    worked_on = {
        "savedmodel": there / "note",
        "onnx": there,
        "golden": there.parent / "bolt.golden/n",
    }
    worked_on[which].write_text("mine")
    changed = tree(there.parent)
    with pytest.raises(UserError, match="not as the earlier export left it"):
        place.put(*make(tmp_path, kind, "third"), there, kind, {})
    assert tree(there.parent) == changed != before


@pytest.mark.parametrize("renames", range(6))
def test_an_interruption_leaves_the_earlier_export(renames, tmp_path, monkeypatch):
    there = tmp_path / "out" / "bolt"
    place.put(*make(tmp_path, "savedmodel", "first"), there, "savedmodel", {})
    before = tree(there.parent)
    rename, done = pathlib.Path.rename, []

    def interrupted(path, target):
        done.append(path)
        if len(done) == renames + 1:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        place.put(*make(tmp_path, "savedmodel", "second"), there, "savedmodel", {})
    assert tree(there.parent) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("gs://bucket/bolt", "local path"),
        ("", "local path"),
        ("file/bolt", "cannot write .*file/bolt: Not a directory"),
        ("n" * 254, "cannot write .*: File name too long"),
    ],
)
def test_a_place_that_cannot_be_is_refused_at_once(output, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("file").write_text("mine")
    with pytest.raises(UserError, match=message):
        export.prepare("stablehlo", output)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_missing_packages_are_had_from_the_source_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"jax2onnx.*pip install -e '\.\[export\]' in the folder"):
        export.prepare("onnx", tmp_path / "bolt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [{"int8": True}, {"opset": 21}])
def test_options_of_other_formats_are_refused(option, tmp_path):
    with pytest.raises(UserError, match=f"--{list(option)[0]} is for --format=onnx"):
        export.prepare("stablehlo", tmp_path / "bolt", **option)


def test_a_name_of_another_format_is_refused(tmp_path):
    with pytest.raises(UserError, match="onnx is called as --format=onnx is, but .* stablehlo"):
        export.prepare("stablehlo", tmp_path / "bolt.onnx")


def test_the_program_refuses_a_run_before_it_reads_the_checkpoint(tmp_path):
    run = tmp_path / "run"
    occupy(run, "run")
    before = tree(tmp_path)
    result = subprocess.run(
        [sys.executable, "launch/export.py", f"--checkpoint={run}", "--format=onnx",
         f"--output={run}"], cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1
    assert "is a folder that no run.json calls an export" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("output", ["run/checkpoints/bolt", "link/14", "run/checkpoints"])
def test_nothing_is_written_among_checkpoints(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    occupy(tmp_path / "run", "run")
    (tmp_path / "link").symlink_to("run/checkpoints")
    before = tree(tmp_path)
    message = f"--output=.*{output}: nothing else may lie among the checkpoints in .*run"
    with pytest.raises(UserError, match=message):
        export.prepare("savedmodel", output)
    with pytest.raises(UserError, match=message):
        predictions.prepare(output)
    assert tree(tmp_path) == before
    # A folder that is only called so, without any, is anybody's.
    (tmp_path / "checkpoints").mkdir()
    export.prepare("savedmodel", "checkpoints/bolt")
