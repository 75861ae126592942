"""Programs in processes of their own, alone or several of one run."""

import os
import pathlib
import socket
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


def environment(devices=1, **variables):
    """This process' own, with so many virtual devices."""
    flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")
    return os.environ | {"XLA_FLAGS": flags, "HF_HUB_OFFLINE": "1"} | variables


def execute(arguments, devices=1, **variables):
    """Runs a program to its end."""
    return subprocess.run(
        arguments, cwd=ROOT, env=environment(devices, **variables), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def start(arguments, devices=1, **variables):
    """Starts a program."""
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment(devices, **variables), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(processes):
    """Exit statuses, standard outputs and standard errors."""
    outputs = [process.communicate(timeout=500) for process in processes]
    return [process.returncode for process in processes], *zip(*outputs)


def free_port():
    """A port for a coordinator on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
