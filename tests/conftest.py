"""Fixtures that every test may use, and jaxtyping's run-time checks switched on."""

import os
import pathlib

# Before anything imports the package: annotations of shapes are checked at run time.
from jaxtyping import install_import_hook

install_import_hook(
    ["prn_jax.models", "prn_jax.losses", "prn_jax.metrics", "prn_jax.mesh", "prn_jax.evaluate"],
    "beartype.beartype",
)
# Several virtual devices, for the tests of what is sharded.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real development data and weights; skips the test where it is absent."""
    root = pathlib.Path(__file__).resolve().parent.parent
    path = pathlib.Path(os.environ.get("PRN_SHARED", root.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no development data at {path} (set PRN_SHARED)")
    return path
