"""Fixtures that every test may use, and jaxtyping's run-time checks switched on."""

import atexit
import contextlib
import os
import pathlib
import shutil
import signal
import tempfile

# Before anything imports the package: annotations of shapes are checked at run time.
from jaxtyping import install_import_hook

install_import_hook(
    ["prn_jax.models", "prn_jax.losses", "prn_jax.metrics", "prn_jax.mesh", "prn_jax.evaluate"],
    "beartype.beartype",
)
# Several virtual devices, for the tests of what is sharded. Most of a small test's time is
# compilation, so that optimises less, and what one test compiled the others (and the processes
# they start) find again. Where the machine is busy with other things, a device waits for the others
# longer than XLA's 40 seconds.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=1",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    )
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# What a program would start anew for, see tests/test_program.py.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="prn_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Behind a shell's & Ctrl-C is ignored, by the programs that a test starts and interrupts, too.
with contextlib.suppress(ValueError):  # not the main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)

import filelock  # noqa: E402
import pytest  # noqa: E402

from prn_jax import program  # noqa: E402

program.leave_convs_to_eigen()  # as each program does


# The longest files, so that no worker begins one when the others have ended.
_LONG = ("test_main.py", "test_scale.py", "test_tools.py", "test_command.py", "test_train.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real development data and weights; skips the test where it is absent."""
    root = pathlib.Path(__file__).resolve().parent.parent
    path = pathlib.Path(os.environ.get("PRN_SHARED", root.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no development data at {path} (set PRN_SHARED)")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> pathlib.Path:
    """The folder of a trained network, one for all who ask: whoever is first trains it."""
    from tests import steps

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "trained"
    with filelock.FileLock(root / "trained.lock"):
        if not folder.exists():
            steps.train_briefly(folder)
    return folder / steps.PLACE
