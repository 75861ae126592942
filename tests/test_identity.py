"""What a run is made of, and who works in a folder."""

import dataclasses
import errno
import fcntl
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from configs import default, mvtec
from configs import folder as folder_config
from prn_jax import datasets, experiment, identity, pretrained, program, train, trained_on
from prn_jax.errors import Interrupted, UserError
from prn_jax.identity import Identity
from prn_jax.splits import Images
from tests import tiny
from tests.processes import ROOT
from tests.trees import draw, draw_mask, make_mvtec, save


def make(using=None, **changes):
    using = using or default.get_config()
    known = Identity("folder", "bolt", "f00d", ("test/a/1", "test/a/2"), 12, 0,
                     identity.as_dict(using), textures="f00d", dtype="float32")  # fmt: skip
    return dataclasses.replace(known, **changes)


def changed(**fields):
    config = default.get_config()
    config.update_from_flattened_dict(fields)
    return identity.as_dict(config)


DIFFERENCES = {
    "images added": ({"fingerprint": "beef"}, "the images changed"),
    "another seen one": ({"seen": ("test/a/1", "test/a/2", "test/a/3")}, "newly a seen .*test/a/3"),
    "one seen no more": ({"seen": ("test/a/1",)}, "no longer a seen anomaly: test/a/2"),
    "longer": ({"steps": 20}, "its steps were 12, are 20"),
    "score_pixels": ({"config": changed(score_pixels=50)}, "score_pixels was 100, is 50"),
    "textures": ({"textures": "beef"}, r"the textures \(synthesis.textures\) changed"),
    "a type": ({"dtype": "bfloat16"}, "it was computed in float32, is in bfloat16"),
    "a file that moved": (
        {"config": changed(**{"patch_map.backbone.weights": "b.pth"})},
        "patch_map.backbone.weights was '', is 'b.pth'",
    ),
    "a seed": ({"config": changed(seed=3)}, "seed was 0, is 3"),
}


@pytest.mark.parametrize("name", list(DIFFERENCES))
def test_what_differs_is_named_and_refused(name):
    changes, message = DIFFERENCES[name]
    with pytest.raises(UserError, match=f"made of something else .*{message}"):
        make().check(make(**changes), "the checkpoint")
    if name == "one seen no more":  # it would be tested on
        with pytest.raises(UserError, match="would be tested on"):
            make().check(make(**changes), "the checkpoint", allow=True)
    else:
        assert make().check(make(**changes), "the checkpoint", allow=True).changes


def test_the_same_textures_may_lie_elsewhere():
    moved = changed(**{"synthesis.textures": "/mnt/dtd"})
    assert not make().differences(make(config=moved))
    config = default.get_config()
    config.synthesis.textures = "/mnt/dtd"
    assert not make().differences(make().today(config, "f00d", "f00d"))
    for other in ("beef", ""):  # nor are others the same because the path is
        assert "synthesis.textures was" in str(
            make().differences(make().today(config, "f00d", other))
        )


def test_what_was_trained_on_never_says_what_a_threshold_promises():
    held = make(changed_config := default.get_config(), held=("train/good/1",))
    changed_config.data.holdout = 0.1
    more = dataclasses.replace(held, held=("train/good/1", "train/good/2"))
    for allow in (False, True):
        with pytest.raises(UserError, match=r"\(train/good/2\) would set its thresholds"):
            held.check(more, "the checkpoint", allow)
    assert not more.check(held, "the checkpoint", True).differences(held)
    # A run of before there was a share to hold out is one that held nothing out; one look, so many
    # doublings.
    stored = make().as_json()
    del stored["held"], stored["config"]["data"]["holdout"], stored["config"]["thresholds"]
    stored["config"]["backbone"]["doublings"] = 0
    assert not Identity.from_json(stored).differences(make())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 8}, "12 steps are done, and none is undone"),
        ({"white_level": 65535}, "level 4095 was white .* now it is 65535"),
        ({"config": changed(tile_overlap=0)}, "tile_overlap was 32.*network would be another"),
        ({"config": changed(image_size=(64, 64))}, "image_size was.*network would be another"),
        ({"config": changed(**{"patch_map.weight": 2.0})}, "patch_map.*network would be another"),
        ({"config": changed(**{"optimizer.average": 0.9})}, "average.*network would be another"),
    ],
)
def test_what_cannot_be_gone_on_with_is_never_allowed(changes, message):
    saved = make(white_level=4095)
    for allow in (False, True):
        with pytest.raises(UserError, match=message) as error:
            saved.check(dataclasses.replace(saved, **changes), "it", 12, allow)
        assert "allow_config_change" not in str(error.value)


def test_deeper_images_may_come_where_there_were_none():
    assert make().check(make(fingerprint="beef", white_level=4095), "it", 12, allow=True).changes


def test_what_changes_no_figure_may_differ():
    config = default.get_config()
    config.update(log_every=3, eval_batch_size=8, eval_every=5)
    config.data.manual_dir = "/elsewhere"
    assert not make().differences(make(config))
    assert Identity.from_json(make().as_json()) == make()


def test_what_was_trained_on_is_remembered_and_never_tested_on(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)

    def some(*numbers):
        none = np.zeros((len(numbers), 4, 4), np.uint8)
        return Images(pixels[list(numbers)], none, ["good"] * len(numbers), list(map(str, numbers)))

    def known():
        return sorted(trained_on.recall(tmp_path).values())

    def remember(*parts, held=(5,), resumed=False):
        trained_on.remember(tmp_path, *(some(*x) for x in (*parts, held)), resumed=resumed)

    remember((0, 1), (2,), (3,))
    assert known() == ["0", "1", "2"]
    assert sorted(trained_on.judged_on(tmp_path).values()) == ["3", "5"]
    # A training that left no checkpoint left nothing that was trained on.
    remember((0,), (2,), (1, 3))
    assert known() == ["0", "2"]
    remember((4,), (2,), (3,), resumed=True)
    assert known() == ["0", "2", "4"]
    assert sorted(trained_on.judged_on(tmp_path).values()) == ["3", "5"]
    for tested, held in (((3, 0), (5,)), ((3,), (5, 0))):
        with pytest.raises(UserError, match="has had 0 among its images, which would be tested on"):
            remember((4,), (2,), tested, held=held, resumed=True)
    # What lies in both folders from the beginning is the user's to know.
    remember((0, 4), (2,), (3, 0), resumed=True)


# --- the lock -------------------------------------------------------------------------------------

HOLD = """
import sys, time
from prn_jax.identity import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_newcomer_is_told_who_is_there_and_a_killed_one_holds_nothing(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another training .*process {holder.pid} on .* since"):
        identity.lock(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with identity.lock(tmp_path):
        pass


def test_a_lock_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(identity.os, "write", full)
    with pytest.raises(
        UserError, match=rf"cannot write to {tmp_path} \(--workdir\): No space left"
    ):
        identity.lock(tmp_path).__enter__()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_other_training(code, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with identity.lock(tmp_path):
        pass


# --- whose records --------------------------------------------------------------------------------


def where(root, records):
    return {"manual_dir": root, "data_dir": records}


def test_products_of_two_projects_have_records_of_their_own(tmp_path, monkeypatch):
    records = tmp_path / "records"
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for project, good in (("a", 2), ("b", 3)):
        make_mvtec(tmp_path / project, "bolt", good=good)
        make_mvtec(tmp_path / project, f"only_{project}")
    found = {}
    for project in "ab":
        for product in ("bolt", f"only_{project}"):
            datasets.prepare("folder", product, **where(tmp_path / project, records))
        found[project] = datasets.prepare("folder", "bolt", **where(tmp_path / project, records))
    assert found["a"].data_dir != found["b"].data_dir
    counts = [found[x].info.splits["test"].num_examples for x in "ab"]
    assert counts == [7, 8]
    assert not list((tmp_path / "temporary").iterdir())  # TFDS would leave an empty folder for each
    # All is what is in the folder, whatever records there are besides.
    for project in "ab":
        names = datasets.all_categories("folder", tmp_path / project, records)
        assert names == ["bolt", f"only_{project}"]


@pytest.mark.parametrize("get_config", [mvtec.get_config, folder_config.get_config])
def test_no_data_is_an_error_that_says_what_was_looked_for(get_config, tmp_path):
    config = get_config()
    config.data.data_dir = str(tmp_path / "records")
    for place in (tmp_path / "mistyped", tmp_path):
        config.data.manual_dir = str(place)
        with pytest.raises(UserError, match=rf"{place}.*manual_dir"):
            experiment.train_and_evaluate(config, str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_records_without_raw_files_count_where_their_category_is_named(tmp_path):
    make_mvtec(tmp_path / "raw", "bolt")
    records = tmp_path / "records"
    datasets.prepare("folder", "bolt", **where(tmp_path / "raw", records))
    (tmp_path / "raw").rename(tmp_path / "gone")
    builder = datasets.prepare("folder", "bolt", **where(tmp_path / "raw", records))
    assert builder.info.splits["train"].num_examples == 4
    with pytest.raises(UserError, match="no folder .*raw"):
        datasets.all_categories("folder", tmp_path / "raw", records)


# --- before anything is computed ------------------------------------------------------------------


def test_weights_that_cannot_be_had_are_missed_before_any_data_is_read(tmp_path):
    make_mvtec(tmp_path / "raw", "bolt", size=(64, 64))
    config = folder_config.get_config()
    config.data.manual_dir, config.data.data_dir = str(tmp_path / "raw"), str(tmp_path / "records")
    config.backbone.weights = str(tmp_path / "missing.npz")
    config.batch_size, config.num_seen = 8, 5
    with pytest.raises(UserError, match=r"missing\.npz"):
        experiment.train_and_evaluate(config, str(tmp_path / "work"))
    assert not (tmp_path / "records").exists()
    config.backbone.weights = "random"
    pretrained.check(config)


def test_a_repeated_override_counts_once():
    code = (
        "import sys; from absl import flags; from ml_collections import config_flags;"
        "from prn_jax import program;"
        "c = config_flags.DEFINE_config_file('config');"
        "program.run(lambda: print(c.value.image_size, c.value.synthesis.extended_scale,"
        " c.value.attention.divisions))"
    )
    given = ["--config=configs/mvtec.py", "--config.image_size=128", "--config.image_size", "64",
             "--config.synthesis.extended_scale=(0.1,0.2)",
             "--config.synthesis.extended_scale=(0.3,0.4)",
             "--config.attention.divisions=(1,2,3)",
             "--config.attention.divisions=(1,2)"]  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout == "(64,) (0.3, 0.4) (1, 2)\n", result.stderr


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.5GiB.\n[lots of XLA]",
        "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.",
    ],
)
def test_a_device_that_is_too_small_is_one_line(text):
    message = program._explained(RuntimeError(text))
    assert "lower batch_size" in message
    assert "\n" not in message
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert program._explained(full).startswith("No space left on device: free some, or set TMPDIR")
    assert program._explained(RuntimeError("a mistake of ours")) is None


def test_a_defect_added_changes_the_fingerprint(tmp_path):
    make_mvtec(tmp_path / "raw", "bolt")
    place = where(tmp_path / "raw", tmp_path / "records")
    before = datasets.fingerprint("folder", "bolt", **place)
    save(tmp_path / "raw/bolt/test/contamination/9.png", draw(9))
    save(tmp_path / "raw/bolt/ground_truth/contamination/9_mask.png", draw_mask(9))
    assert datasets.fingerprint("folder", "bolt", **place) != before


# --- whole runs -----------------------------------------------------------------------------------


QUICK = tiny.FIELDS | {
    "category": "bolt",
    "num_seen": 3,
    "total_steps": 12,
    "log_every": 1,
    "checkpoint.every_steps": 4,
}


def fields_of(folder, **changes):
    """A run of 12 steps on `<folder>/raw`."""
    place = where(str(folder / "raw"), str(folder / "records"))
    return QUICK | {f"data.{name}": path for name, path in place.items()} | changes


def run(folder, allow=False, **changes):
    """Trains in `<folder>/work`; what results.json says then."""
    config = folder_config.get_config()
    config.update_from_flattened_dict(fields_of(folder, **changes))
    experiment.train_and_evaluate(config, str(folder / "work"), allow_config_change=allow)
    return read(folder)


def read(folder):
    return json.loads((folder / "work/bolt/results.json").read_text())


def steps_of(folder):
    return sorted(int(x.name) for x in (folder / "work/bolt/checkpoints").iterdir() if x.is_dir())


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    tiny.register()
    folder = tmp_path_factory.mktemp("finished")
    make_mvtec(folder / "raw", "bolt", defects={"dent": 6}, train=6, good=3, size=(64, 64))
    run(folder)
    return folder


@pytest.fixture
def finished(finished_once, tmp_path):
    """A copy of a finished run with its data."""
    return pathlib.Path(shutil.copytree(finished_once, tmp_path / "copy"))


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="absl")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def add_normal(folder):
    save(folder / "raw/bolt/train/good/100.png", draw(100, (64, 64)))


def add_defect(folder):
    """One that changes which are drawn as seen ones: 000, 001, 005 before, 000, 0000, 004 then."""
    save(folder / "raw/bolt/test/dent/0000.png", draw(100, (64, 64)))
    save(folder / "raw/bolt/ground_truth/dent/0000_mask.png", draw_mask(100, (64, 64)))


CHANGED = {
    "images added": (add_normal, {}, "the images changed: some were added"),
    "score_pixels": (None, {"score_pixels": 3}, "score_pixels was 100, is 3"),
    "longer": (None, {"total_steps": 14}, "total_steps was 12, is 14"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CHANGED))
def test_a_finished_run_of_something_else_is_refused_or_made_anew(name, finished, said):
    change, fields, message = CHANGED[name]
    before = read(finished)
    if change:
        change(finished)
    with pytest.raises(UserError, match=f"the finished run in .*{message}.*--allow_config_change"):
        run(finished, **fields)
    assert read(finished) == before
    again = run(finished, allow=True, **fields)
    assert re.search(f"checkpoint of step 12 .*{message}.*: going on", said())
    assert "finished before" not in said()
    steps = fields.get("total_steps", 12)
    assert again["steps"] == steps == steps_of(finished)[-1]
    assert again["timing"]["train_steps"] == steps - 12
    assert re.search(message, again["identity"]["changes"][0])
    # Trained further, or other pixels counted: other scores. Normal images to train on change none.
    old, new = ([(x["id"], x["score"]) for x in run["test"]] for run in (before, again))
    assert (new == old) == (name == "images added")
    assert (
        f"| bolt | {100 * again['metrics']['image_auroc']:.1f}"
        in (finished / "work/results.md").read_text()
    )
    # Now it is made of what is there.
    assert run(finished, **fields) == again
    assert "finished before" in said()


@pytest.mark.slow
@pytest.mark.parametrize("allow", [False, True])
def test_no_step_is_undone(allow, finished, said):
    before = read(finished)
    with pytest.raises(UserError, match=r"total_steps was 12, is 8.*12 steps are done.*back") as e:
        run(finished, allow, total_steps=8)
    assert "allow_config_change" not in str(e.value)
    assert read(finished) == before
    # Nor is a network used with another region of interest than its prototypes'.
    region = finished / "raw/bolt/roi.png"
    save(region, np.uint8(255 * (np.indices((64, 64)).sum(axis=0) > 0)))  # all but a corner
    if allow:
        with pytest.raises(UserError, match=r"another region of interest\. Put roi.png back"):
            run(finished, allow)
        assert read(finished) == before
    region.unlink()
    # The same of a checkpoint without results.
    (finished / "work/bolt/results.json").unlink()
    with pytest.raises(UserError, match=r"the checkpoint of step 12 .*12 steps are done"):
        run(finished, allow, total_steps=8)


@pytest.mark.slow
def test_a_defect_that_came_while_a_run_was_interrupted_is_refused_by_name(finished, monkeypatch):
    whole = read(finished)
    shutil.rmtree(finished / "work")
    original = train.Progress

    def stop(config, *arguments):
        progress = original(config, *arguments)
        update = progress.update

        def update_and_signal(step, values):
            update(step, values)
            if step == 6:
                signal.raise_signal(signal.SIGTERM)

        progress.update = update_and_signal
        return progress

    with monkeypatch.context() as patch:
        patch.setattr(train, "Progress", stop)
        with pytest.raises(Interrupted, match="stopped at step 6 of 12 and saved"):
            run(finished)
    add_defect(finished)
    message = (
        r"checkpoint of step 6 .*images changed.*no longer a seen anomaly: test/dent/001, test/dent"
        r"/005; newly a seen anomaly: test/dent/0000, test/dent/004.*would be tested on.*Put the im"
    )
    for allow in (False, True):
        with pytest.raises(UserError, match=message):
            run(finished, allow)
    assert steps_of(finished)[-1] == 6
    assert not (finished / "work/bolt/results.json").exists()
    for path in finished.glob("raw/bolt/*/dent/0000*"):
        path.unlink()
    again = run(finished)
    assert again["split"] == whole["split"]
    assert (again["metrics"], again["test"]) == (whole["metrics"], whole["test"])
