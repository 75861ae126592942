"""The program as a user runs it: bad input, interruptions, several processes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import special

from configs import mvtec
from prn_jax import experiment, identity, results
from prn_jax.checkpoints import Checkpoints
from prn_jax.errors import UserError
from tests import tiny
from tests.processes import ROOT, environment, execute, finish, free_port, start
from tests.trees import make_mvtec

STEPS = 12
SMALL = tiny.FIELDS | {
    "total_steps": STEPS,
    "log_every": 1,
    "checkpoint.every_steps": 2,
    "optimizer.learning_rate": 1e-4,
}


def command(config, workdir, *arguments, **fields):
    overrides = [f"--config.{k}={v}" for k, v in (SMALL | fields).items()]
    program = [sys.executable, "-m", "tests.tiny", "launch/main.py"]
    return [
        *program, f"--config=configs/{config}.py", f"--workdir={workdir}", *overrides, *arguments,
    ]  # fmt: skip


def final_variables(workdir, category="gravel"):
    checkpoints = Checkpoints(workdir / category / "checkpoints")
    assert checkpoints.latest_step() == STEPS
    variables = checkpoints.restore_model()
    checkpoints.close()
    return variables


def assert_equal(a, b, **tolerance):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, err_msg=name, **({"rtol": 0, "atol": 0} | tolerance))


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bottle(tmp_path_factory):
    """A tiny MVTec AD with one category."""
    root = tmp_path_factory.mktemp("mvtec")
    make_mvtec(root, defects={"broken": 12}, size=(64, 64))
    return root


def truncate(root):
    path = root / "bottle" / "train" / "good" / "001.png"
    path.write_bytes(path.read_bytes()[:400])


def remove_mask(root):
    (root / "bottle" / "ground_truth" / "broken" / "003_mask.png").unlink()


def add_mask(root):
    Image.new("L", (64, 64), 255).save(root / "bottle/ground_truth/broken/099_mask.png")


BAD = {
    "a wrong path": ({"data.manual_dir": "/nowhere"}, None, r"/nowhere/bottle/train.*manual_dir"),
    "an unreadable image": ({}, truncate, r"train/good/001.png"),
    "an image without a mask": ({}, remove_mask, r"broken/003.png.*without a mask"),
    "a mask without an image": ({}, add_mask, r"099_mask.png.*without an image"),
    "an unknown category": ({"category": "botle"}, None, r"'botle'.*did you mean 'bottle'"),
    "an indivisible batch": ({"batch_size": 7}, None, r"batch_size=7 cannot be divided among \d"),
    "a misspelt field": ({"batchsize": 8}, None, r"batchsize.*batch_size"),
    "a wrong size": ({"image_size": 100}, None, r"image_size=.?100.*give .*multiple of 32"),
    "a folder without textures": ({"synthesis.textures": "/nowhere"}, None, r"no such folder"),
    "too many seen anomalies": ({"num_seen": 99}, None, r"num_seen=99, but there are only 12"),
}


def bad_fields(name, bottle, tmp_path):
    fields, spoil, message = BAD[name]
    root = bottle
    if spoil:
        root = tmp_path / "raw"
        make_mvtec(root, defects={"broken": 12}, size=(64, 64))
        spoil(root)
    fields = {
        "backbone.name": "resnet18",
        "category": "bottle",
        "data.manual_dir": str(root),
        "data.data_dir": str(tmp_path / "records"),
    } | fields
    return fields, message


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["a misspelt field", "an unreadable image", "too many seen anomalies"]
)
def test_bad_input_is_one_line(name, bottle, tmp_path):
    fields, message = bad_fields(name, bottle, tmp_path)
    result = execute(command("mvtec", tmp_path / "work", **fields), devices=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1, result.stderr
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in BAD if x != "a misspelt field"])
def test_bad_input_leaves_nothing(name, bottle, tmp_path):
    tiny.register()
    fields, message = bad_fields(name, bottle, tmp_path)
    config = mvtec.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(SMALL | fields)
    with pytest.raises(UserError, match=message) as refused:
        experiment.train_and_evaluate(config, str(tmp_path / "work"))
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "work").rglob("results.json"))
    written = [p for p in (tmp_path / "work").glob("bottle/checkpoints/*") if p.is_dir()]
    assert not written
    assert not list((tmp_path / "records").rglob("*incomplete*"))


def test_help_names_every_flag():
    result = execute([sys.executable, "launch/main.py", "--help"])
    assert "Trains and evaluates PRN" in result.stdout
    assert "--workdir" in result.stdout


def with_file_size_limit(kibibytes, arguments):
    """No file may become larger: writing fails half-way, as on a full disk."""
    return ["bash", "-c", f'ulimit -f {kibibytes}; exec "$@"', "bash", *map(str, arguments)]


@pytest.mark.slow
def test_records_that_cannot_be_written_are_one_line(bottle, tmp_path):
    fields = {"data.manual_dir": bottle, "data.data_dir": tmp_path / "records"}
    arguments = command("mvtec", tmp_path / "work", category="bottle", **fields)
    result = execute(with_file_size_limit(20, arguments))
    assert result.returncode == 1
    assert re.search(r"^error: cannot write .*File too large", result.stderr, re.M), result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "records").rglob("*.tfrecord*"))


# --- interruptions --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_fields(tmp_path_factory):
    return {"data.data_dir": tmp_path_factory.mktemp("records"), "score_distance": 1.0}


@pytest.fixture(scope="module")
def uninterrupted(demo_fields, tmp_path_factory):
    """A whole run: its work folder, what it printed, its variables and results."""
    workdir = tmp_path_factory.mktemp("whole")
    result = execute(command("demo", workdir, **demo_fields))
    assert result.returncode == 0, result.stderr
    run = json.loads((workdir / "gravel/results.json").read_text())
    return workdir, result.stdout, final_variables(workdir), run


def interrupt(arguments, wait, signal_number):
    """Starts the program, waits for a step and for `wait(process)`, signals; its exit status."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step "):
            wait(process)
            process.send_signal(signal_number)
            break
    lines += process.stderr.readlines()
    return process.wait(timeout=120), "".join(lines)


def unfinished_saves(workdir):
    """What Orbax is writing, or was when it was killed."""
    return list(workdir.glob("gravel/checkpoints/*.orbax-checkpoint-tmp/*"))


# PRN_KILLS=20 tries twenty runs' moments.
@pytest.mark.slow
@pytest.mark.parametrize("number", range(int(os.environ.get("PRN_KILLS", "1"))))
def test_a_run_stopped_again_and_again_ends_as_the_uninterrupted_one(
    number, demo_fields, uninterrupted, tmp_path
):
    draw, stopped_at = random.Random(number), None
    arguments = command("demo", tmp_path, **demo_fields)

    def goes_on(log):
        """From where the run before was stopped and saved, if it was."""
        nonlocal stopped_at
        if stopped_at:
            assert f"resumed from step {stopped_at}" in log
        found = re.search(r"stopped at step (\d+) of 12 and saved; the same command goes on", log)
        stopped_at = found and found[1]
        assert "Traceback" not in log

    def in_a_save(process):
        while not unfinished_saves(tmp_path):
            assert process.poll() is None
            time.sleep(0.001)

    def anywhere(process):
        for _ in range(draw.randrange(3)):  # steps; some of those that are left
            next(line for line in process.stderr if line.startswith("step "))

    stops = [(signal.SIGTERM, anywhere), (signal.SIGKILL, in_a_save), (signal.SIGINT, in_a_save)]
    if "PRN_KILLS" in os.environ:
        stops.append((signal.SIGKILL, anywhere))
    for how, wait in stops:
        status, log = interrupt(arguments, wait, how)
        goes_on(log)
        if how == signal.SIGKILL:
            assert status == -signal.SIGKILL, log
            assert unfinished_saves(tmp_path) or wait is anywhere
        else:
            assert status == 128 + how, log
            assert stopped_at, log
            assert not unfinished_saves(tmp_path)

    result = execute(with_file_size_limit(2000, arguments))
    goes_on(result.stderr)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert re.fullmatch(r"error: cannot write checkpoints to .*: File too large; .*", lines[-1])
    # TensorStore's and Orbax's threads keep quiet about it.
    assert sum("error" in line.lower() for line in lines) == 1, result.stderr

    result = execute(arguments)
    assert result.returncode == 0, result.stderr
    assert "resumed from step" in result.stderr
    _, _, variables, run = uninterrupted
    assert_equal(final_variables(tmp_path), variables)
    left = {x.name for x in (tmp_path / "gravel/checkpoints").iterdir() if x.is_dir()}
    assert left == {"10", "12"}
    again = json.loads((tmp_path / "gravel/results.json").read_text())
    assert again["metrics"] == run["metrics"]
    assert again["test"] == run["test"]


@pytest.mark.slow
def test_a_score_is_of_the_map_and_of_the_distance(uninterrupted):
    workdir, _, variables, run = uninterrupted
    _, maps, *_ = results.read_predictions(workdir / "gravel")
    highest = np.sort(maps.reshape(len(maps), -1).astype(np.float64))[:, -6:].mean(axis=1)
    scores, distances = (np.array([x[name] for x in run["test"]]) for name in ("score", "distance"))
    power = variables["prototypes"]["whole"]["exponent"]
    assert power > 0.15
    logits = special.logit(highest) + power * np.log(distances + 0.1)
    np.testing.assert_allclose(special.logit(scores), logits, atol=0.01)


@pytest.mark.slow
def test_a_finished_category_is_not_run_again(demo_fields, uninterrupted):
    workdir, printed, _, _ = uninterrupted
    written = (workdir / "gravel" / "results.json").stat().st_mtime_ns
    second = execute(command("demo", workdir, **demo_fields))
    assert "gravel: finished before" in second.stderr
    assert (workdir / "gravel" / "results.json").stat().st_mtime_ns == written
    assert second.stdout == printed
    third = execute(command("demo", workdir, **demo_fields | {"seed": 1}))
    assert third.returncode == 1
    assert "seed was 0, is 1" in third.stderr


@pytest.mark.slow
def test_a_second_training_in_a_folder_ends_and_touches_nothing(
    demo_fields, uninterrupted, tmp_path
):
    # A training holds the lock, and says who it is.
    assert (uninterrupted[0] / "gravel/.lock").read_text().startswith("process ")
    with identity.lock(tmp_path / "gravel"):
        before = sorted(tmp_path.rglob("*"))
        second = execute(command("demo", tmp_path, **demo_fields))
        assert sorted(tmp_path.rglob("*")) == before
    assert second.returncode == 1
    (line,) = [x for x in second.stderr.splitlines() if x.startswith("error: ")]
    said = f"another training works in {tmp_path}/gravel (process {os.getpid()} on "
    assert line.startswith(f"error: {said}")
    assert "Traceback" not in second.stderr


# --- several processes and devices ----------------------------------------------------------------


def start_two(config, workdir, **fields):
    """Two processes of one run, with two devices each."""
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    return [
        start(
            command(
                config, workdir, coordinator, "--num_processes=2", f"--process_id={i}", **fields
            ),
            devices=2,
        )
        for i in range(2)
    ]


@pytest.mark.slow
def test_two_processes_of_two_devices_make_the_run_of_one(demo_fields, uninterrupted, tmp_path):
    # One of the two is asked to stop: both agree on the step, save and exit.
    fields = demo_fields | {"checkpoint.every_steps": 0}
    processes = start_two("demo", tmp_path, **fields)
    for line in processes[0].stderr:
        if line.startswith("step 4/"):
            processes[1].send_signal(signal.SIGTERM)
            break
    statuses, _, logs = finish(processes)
    assert statuses == [143, 143], logs
    stopped = [re.search(r"stopped at step (\d+) of 12 and saved; the same", x) for x in logs]
    assert all(stopped), logs
    assert 4 <= int(stopped[0][1]) == int(stopped[1][1]) < STEPS
    # The same command goes on.
    statuses, outputs, logs = finish(start_two("demo", tmp_path, **fields))
    assert statuses == [0, 0], logs
    assert f"resumed from step {stopped[0][1]} of 12" in logs[0]
    assert "results:" in outputs[0]
    # Only process 0 reports and writes.
    assert "results:" not in outputs[1]
    assert "step " not in logs[1]
    _, _, variables, run = uninterrupted
    found = final_variables(tmp_path)
    assert_equal(found["prototypes"], variables["prototypes"], rtol=1e-4, atol=1e-5)
    again = json.loads((tmp_path / "gravel/results.json").read_text())
    assert again["provenance"]["device"]["processes"] == 2
    for a, b in zip(again["test"], run["test"], strict=True):
        assert a["id"] == b["id"]
        # Rounding alone; tests/test_scale.py compares without it.
        assert a["score"] == pytest.approx(b["score"], abs=0.02)


@pytest.mark.slow
def test_bad_data_ends_all_processes_with_one_line_each(tmp_path):
    fields = {"category": "bottle", "data.manual_dir": "/nowhere", "data.data_dir": tmp_path / "r"}
    statuses, _, logs = finish(start_two("mvtec", tmp_path / "work", **fields))
    assert statuses == [1, 1], logs
    errors = [[x for x in log.splitlines() if x.startswith("error: ")] for log in logs]
    assert [len(x) for x in errors] == [1, 1], logs
    assert "no folder /nowhere/bottle/train" in errors[0][0]
    assert "looking for bottle failed on process 0, which says why" in errors[1][0]
    assert "Traceback" not in "".join(logs)


@pytest.mark.slow
def test_processes_with_other_fields_end_with_one_line_each(tmp_path):
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    processes = [
        start(command("demo", tmp_path / "work", coordinator, "--num_processes=2",
                      f"--process_id={i}", seed=i, **{"data.data_dir": tmp_path / f"records_{i}"}))
        for i in range(2)
    ]  # fmt: skip
    statuses, _, logs = finish(processes)
    assert statuses == [1, 1], logs
    for log in logs:
        (line,) = [x for x in log.splitlines() if x.startswith("error: ")]
        assert "process 1 has other fields (--config, --allow_config_change) than process 0" in line
    assert not (tmp_path / "work").exists()
