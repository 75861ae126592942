"""`prn-jax` as a user installs and runs it: from a wheel, outside of the source tree."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

from prn_jax import __version__, cli
from tests.processes import ROOT, environment

SMALL = {
    "image_size": 64,
    "attention.layers": 0,
    "fusion.enabled": False,
    "decoder.width": 0.25,
    "backbone.weights": "random",
    "batch_size": 8,
    "total_steps": 1,
    "prototypes.iterations": 3,
    "synthesis.max_textures": 20,
}
# Runs a command in this process and says which of the heavy libraries it imported.
RUN = """
import sys
from prn_jax import cli
try:
    cli.main()
finally:
    print("imported:", *sorted({"jax", "tensorflow"} & sys.modules.keys()))
"""


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        list(map(str, arguments)), cwd=cwd, env=environment(PYTHONPATH=""), capture_output=True,
        text=True,
    )  # fmt: skip


def test_the_command_names_its_commands():
    result = run(sys.executable, "-m", "prn_jax", "--help")
    assert result.returncode == 0
    for name in cli.COMMANDS:
        line = next(x for x in result.stdout.splitlines() if x.startswith(f"  {name} "))
        assert line.endswith(".")
    assert result.stdout == run(sys.executable, "-m", "prn_jax").stdout
    unknown = run(sys.executable, "-m", "prn_jax", "tarin")
    assert unknown.returncode == 1
    assert len(unknown.stderr.splitlines()) == 1
    assert "did you mean train?" in unknown.stderr
    assert all(name in unknown.stderr for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_complete_and_imports_nothing_heavy(command):
    result = run(sys.executable, "-c", RUN, command, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("imported:\n")
    source = (ROOT / f"prn_jax/programs/{command}.py").read_text()
    defined = [x.split('"')[1] for x in source.replace("(\n    ", "(").split("flags.DEFINE_")[1:]]
    assert defined
    if "define_config" in source:
        defined.append("config")
        assert "mvtec" in result.stdout
    for name in defined:
        assert f"--{name}:" in result.stdout or f"--[no]{name}:" in result.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mvtek", "there are btad, dagm, "),
        ("configs/mvtek.py", "no such file; give another, or one of btad, dagm, "),
    ],
)
def test_a_configuration_that_is_not_there_is_one_line(given, message):
    arguments = ["train", f"--config={given}", "--workdir=nowhere"]
    result = run(sys.executable, "-m", "prn_jax", *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: --config={given}: {message}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("config", [["--config=demo"], ["--config", "demo"]])
def test_overrides_may_precede_the_configuration(config):
    """As launch/tpu_vm.sh gives them."""
    arguments = ["train", "--workdir=nowhere", "--config.batch_size=0", *config]
    result = run(sys.executable, "-m", "prn_jax", *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: batch_size"), result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The programs' folder of an environment that has the package from a wheel alone."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("prn_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, source]
    assert (made := run(*build, cwd=root)).returncode == 0, made.stderr
    (wheel,) = root.glob("*.whl")
    environment = root / "environment"
    assert run(sys.executable, "-m", "venv", "--without-pip", environment).returncode == 0
    (site,) = environment.glob("lib/python*/site-packages")
    # What this package needs, but not what is installed there by a path, as this package may be.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [*pip, "--python", environment / "bin/python", "install", "--no-deps", "--no-index"]
    made = run(*install, wheel, cwd=root)
    assert made.returncode == 0, made.stderr
    return environment / "bin"


def test_a_wheel_holds_every_configuration(installed, tmp_path):
    code = (
        "import importlib, prn_jax; from prn_jax import program; print(prn_jax.__file__);"
        "print(*program.config_names());"
        "[importlib.import_module(f'prn_jax.configs.{x}').get_config()"
        " for x in program.config_names()]"
    )
    result = run(installed / "python", "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    where, names = result.stdout.splitlines()
    assert pathlib.Path(where).is_relative_to(installed.parent)
    held = {x.stem for x in (ROOT / "configs").glob("*.py")}
    assert set(names.split()) == held - {"__init__", "ablations"}
    version = run(installed / "prn-jax", "--version", cwd=tmp_path)
    assert version.stdout == f"prn-jax {__version__}\n"


@pytest.mark.slow
def test_a_wheel_trains_the_demo_and_shows_it(installed, tmp_path):
    fields = [f"--config.{k}={v}" for k, v in SMALL.items()]
    trained = run(
        installed / "prn-jax", "train", "--config=demo", "--workdir=runs",
        "--config.data.data_dir=records", *fields, cwd=tmp_path,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    run_ = json.loads((tmp_path / "runs/gravel/results.json").read_text())
    assert run_["steps"] == 1
    assert run_["provenance"]["git"] is None
    report = run(installed / "prn-jax", "report", "--workdir=runs", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert report.stdout == "runs/report.html\n"
    assert os.path.getsize(tmp_path / "runs/report.html") > 10_000
