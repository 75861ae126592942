"""The cluster scripts, with stand-ins for gcloud and Slurm that run everything on this machine."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import ROOT

# Notes each call; runs what `ssh` is to run in the home folder, as one of the workers would.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> calls
case "$*" in
  *describe*) echo "$STATE" ;;
  *" scp "*) cp "$5" . ;;
  *tail* | *pkill*) ;;
  *--worker=all*) bash -c "${!#/--command=/}" ;;
esac
"""
# What stands for the worker's Python: prints its arguments, and trains for long.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@"
echo $$ > pid
exec sleep 100
"""
UV = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> ../calls
"""
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > srun_arguments
trap 'kill $!; echo saved; exit "$SAVED"' TERM
[[ $SAVED ]] && { sleep 30 > /dev/null & echo $$ > srun_pid; wait; }
exit 3
"""
SCANCEL = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> calls
kill -TERM "$(cat srun_pid)"
"""
SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> calls
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def running_in(folder):
    """Names of the processes that work in a folder."""
    names = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (process / "cwd").readlink() == folder:
                names.append((process / "comm").read_text().strip())
    return names


def eventually(happened, seconds=20):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def home(tmp_path):
    """A worker's home folder, where the stand-in for gcloud runs commands."""
    write(tmp_path / "bin/gcloud", GCLOUD)
    write(tmp_path / "prn-jax/.venv/bin/python", PYTHON)
    return tmp_path


def tpu_vm(home, *arguments, **variables):
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PROJECT": "mine", "STATE": "ACTIVE"} | variables
    command = ["bash", str(ROOT / "launch/tpu_vm.sh"), *arguments]
    return subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=50
    )


def test_a_run_on_tpu_workers_gets_its_arguments_whole(home):
    given = ["--config=configs/mvtec.py", "--config.image_size=(352, 128)", "--config.category=a'b"]
    result = tpu_vm(home, "run", *given, BUCKET="gs://bucket", NAME="slice")
    assert result.returncode == 0, result.stderr
    log = home / "prn-jax/train.log"
    expected = ["launch/main.py", "--workdir=gs://bucket/runs/slice",
                "--config.data.data_dir=gs://bucket/tfds", "--config.data.manual_dir=",
                *given]  # fmt: skip
    eventually(lambda: log.exists() and log.read_text().splitlines() == expected)
    # It goes on, and the command has returned.
    eventually((home / "prn-jax/pid").exists)
    os.kill(int((home / "prn-jax/pid").read_text()), signal.SIGTERM)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="installs what is committed")
def test_what_is_committed_is_installed(home):
    write(home / ".local/bin/uv", UV)
    result = tpu_vm(home, "install", HOME=str(home))
    assert result.returncode == 0, result.stderr
    revision = ["git", "rev-parse", "HEAD"]
    there, here = (
        subprocess.run(revision, cwd=x, capture_output=True, text=True, check=True).stdout
        for x in (home / "prn-jax", ROOT)
    )
    assert there == here
    assert (home / "prn-jax/setup.py").exists()
    calls = (home / "calls").read_text()
    assert "pip install -q --python=.venv -e .[demo,tpu]" in calls
    assert "--worker=all" in calls
    # Once more, over what is there.
    assert tpu_vm(home, "install", HOME=str(home)).returncode == 0


def test_a_slice_is_asked_for_and_waited_for(home):
    assert tpu_vm(home, "create").returncode == 0
    first, second = (home / "calls").read_text().splitlines()
    assert "queued-resources create prn --zone=us-east5-b --project=mine" in first
    assert "--spot" in first
    assert "queued-resources describe prn" in second
    failed = tpu_vm(home, "create", STATE="FAILED")
    assert failed.returncode == 1
    assert failed.stderr == "error: prn is FAILED\n"


def test_what_is_missing_is_one_line(home):
    result = tpu_vm(home, "install", PROJECT="")
    assert result.stderr == "error: set PROJECT (the Google Cloud project)\n"
    result = tpu_vm(home, "run", BUCKET="")
    assert result.returncode == 1
    assert result.stderr == "error: set BUCKET (gs://..., for the data and the results)\n"
    assert tpu_vm(home, "nonsense").returncode == 1
    shown = tpu_vm(home, "help")
    assert shown.returncode == 0
    assert "launch/tpu_vm.sh run" in shown.stdout
    assert "set -euo" not in shown.stdout


@pytest.fixture
def job(tmp_path):
    """Starts the batch script as Slurm would."""
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        write(tmp_path / "bin" / name, text)
    write(tmp_path / ".venv/bin/activate", "")

    def start(*arguments, saved):
        return subprocess.Popen(
            ["bash", str(ROOT / "launch/slurm.sbatch"), *arguments], cwd=tmp_path,
            stdout=subprocess.PIPE, text=True,
            env=os.environ | {
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SAVED": saved,
                "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "6",
            },
        )  # fmt: skip

    return start


@pytest.mark.parametrize("saved", ["143", "1", "0"])
def test_a_slurm_job_saves_and_queues_itself_again_before_its_time_is_up(saved, job, tmp_path):
    if saved == "0":  # what would queue it late has not begun to sleep when it is ended
        write(tmp_path / "bin/pkill", "#!/bin/sh\nexit 1\n")
    process = job("--config=configs/mvtec.py", "--config.image_size=(352, 128)", saved=saved)
    eventually(lambda: (tmp_path / "srun_pid").exists())
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    eventually(lambda: "bash" not in running_in(tmp_path))  # nothing queues it later
    # Not when it could not save, or had come to its end.
    assert process.returncode == int(saved)
    assert "saved" in output
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["--signal=TERM 7.0"] + ["requeue 7"] * (saved == "143")
    arguments = (tmp_path / "srun_arguments").read_text().splitlines()
    assert arguments[:4] == ["--kill-on-bad-exit=1", "--cpus-per-task=6", "python",
                             "launch/main.py"]  # fmt: skip
    assert arguments[4:] == ["--config=configs/mvtec.py", "--config.image_size=(352, 128)"]


def test_a_slurm_job_that_fails_is_not_queued_again(job, tmp_path):
    process = job("--config=configs/mvtec.py", saved="")
    process.communicate(timeout=20)
    assert process.returncode == 3
    assert not (tmp_path / "calls").exists()


def test_the_tables_of_the_documentation_are_the_script_s():
    printed = subprocess.run(
        [sys.executable, "launch/scaling.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "A study of 45 runs" in printed
    assert printed in (ROOT / "docs/scaling.md").read_text()
