"""A run is what it was made of: differences, locks, whose records count, what is refused."""

import dataclasses
import errno
import fcntl
import signal
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from prn_jax import datasets, experiment, pretrained, program, study
from prn_jax.errors import UserError
from prn_jax.identity import Identity, lock
from tests.processes import ROOT, environment
from tests.trees import make_mvtec

CONFIG = {"epochs": 2, "total_steps": 0, "seed": 0, "score_pixels": 100, "log_every": 1}
MADE_OF = Identity("folder", "bolt", "f1", ("crack/0", "crack/1"), 12, 0, CONFIG)
HOLDER = """
import sys, time
from prn_jax.identity import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def other(**changes):
    return dataclasses.replace(MADE_OF, **changes)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (other(fingerprint="f2"), "the images changed"),
        (other(steps=24, config=CONFIG | {"total_steps": 24}), "total_steps was 0, is 24"),
        (other(config=CONFIG | {"score_pixels": 5}), "score_pixels was 100, is 5"),
    ],
)
def test_what_a_run_is_made_of_is_refused_by_name_and_can_be_let_pass(now, said):
    with pytest.raises(UserError, match=f"{said}.*--allow_config_change"):
        MADE_OF.check(now, "here")
    assert said in MADE_OF.check(now, "here", allow=True).changes[0]
    MADE_OF.check(other(config=CONFIG | {"log_every": 7}), "here")


def test_trained_anomalies_are_never_tested_on():
    now = other(fingerprint="f2", seen=("crack/1", "crack/2"))
    with pytest.raises(UserError, match="no longer a seen anomaly: crack/0; .*: crack/2"):
        MADE_OF.check(now, "here", allow=True)


def test_stored_identities_come_back():
    assert Identity.from_json(MADE_OF.as_json()) == MADE_OF


def test_a_newcomer_is_told_who_is_there_and_a_killed_one_blocks_nobody(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        said = rf"another training works in .*process {holder.pid} "
        with pytest.raises(UserError, match=said), lock(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with lock(tmp_path):
        pass


def test_a_file_system_without_locks_is_not_another_training(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize("folder", ["empty", "mistyped"])
def test_all_of_a_folder_without_data_is_an_error(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=folder):
        datasets.all_categories("mvtec_ad", tmp_path / folder, tmp_path / "records")


def test_products_of_another_project_stay_away(tmp_path):
    records = tmp_path / "records"
    for project, product in (("a", "bolt"), ("b", "nut")):
        make_mvtec(tmp_path / project, product)
    one = {"manual_dir": tmp_path / "a", "data_dir": records}
    datasets.prepare("folder", "bolt", **one)
    assert datasets.all_categories("folder", tmp_path / "b", records) == ["nut"]
    # A product of the same name has records of its own.
    make_mvtec(tmp_path / "b", "bolt", train=9)
    two = {"manual_dir": tmp_path / "b", "data_dir": records}
    datasets.prepare("folder", "bolt", **two)
    prints = [datasets.fingerprint("folder", "bolt", **which) for which in (one, two)]
    assert prints[0] != prints[1]


@pytest.mark.parametrize("form", ["{}={}", "{} {}"])
def test_the_last_override_of_a_field_counts(form, monkeypatch):
    sizes = [form.format("--config.image_size", size) for size in (128, 64)]
    given = " ".join(sizes).split()
    passed_on = study.overrides_of(given, lambda name: name.startswith("config"))
    for arguments in (given, passed_on):
        config = parsed(arguments, monkeypatch)
        assert experiment.checked(config).image_size == (64, 64)


def parsed(arguments, monkeypatch):
    """The configuration as `launch/main.py` gets it."""
    values = flags.FlagValues()
    arguments = ["main.py", f"--config={ROOT / 'configs/default.py'}", *arguments]
    monkeypatch.setattr(sys, "argv", arguments)  # ml_collections looks for overrides there
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(arguments)
    return values.config


def test_too_little_memory_of_the_device_is_one_line():
    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.\nmore"
    message = program._explained(RuntimeError(text))
    assert "lower batch_size" in message
    assert "2147483648 bytes" in message
    assert program._explained(RuntimeError("a mistake")) is None


def test_missing_weights_end_a_run_before_its_data_is_prepared(tmp_path, monkeypatch):
    make_mvtec(tmp_path / "raw", "bolt")

    def missing(_):
        raise UserError("no weights")

    monkeypatch.setattr(pretrained, "check", missing)
    config = parsed([
        "--config.data.name=folder", f"--config.data.manual_dir={tmp_path / 'raw'}",
        f"--config.data.data_dir={tmp_path / 'records'}", "--config.category=bolt",
    ], monkeypatch)  # fmt: skip
    with pytest.raises(UserError, match="no weights"):
        experiment.train_and_evaluate(config, str(tmp_path / "work"))
    assert not (tmp_path / "records").exists()
