"""Prediction by Ray Data: what plain prediction says, by two workers, and nothing twice."""

import numpy as np
import pytest
from PIL import Image

import prn_jax
from prn_jax import ray_data
from tests.processes import ROOT

ray = pytest.importorskip("ray", reason="not installed: pip install -e '.[ray]'")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.mark.slow
def test_two_workers_say_what_one_process_does(trained, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"Ü 划痕 {i}.png" for i in range(6)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (70, 50, 3), np.uint8)).save(path)
    paths[3].write_bytes(paths[3].read_bytes()[:100])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_worker_niceness", "0")
    ray.init(num_cpus=4, include_dashboard=False)
    try:
        options = {"workers": 2, "batch_size": 2}
        assert ray_data.predict_files(paths, trained, tmp_path / "rows", **options) == 6
        # Only what could not be read is tried again, whatever a killed worker left.
        (tmp_path / "rows/cut.parquet").write_bytes(b"PAR1")
        assert ray_data.predict_files(paths, trained, tmp_path / "rows", **options) == 1
        (tmp_path / "rows/cut.parquet").unlink()
    finally:
        ray.shutdown()
    found = {row["image"]: row for row in parquet.read_table(tmp_path / "rows").to_pylist()}
    assert found.keys() == {str(path) for path in paths}
    assert "not a readable image" in found[str(paths[3])]["error"]
    readable = [path for path in paths if path != paths[3]]
    _, scores = prn_jax.load(trained)(readable)
    np.testing.assert_allclose([found[str(x)]["score"] for x in readable], scores, atol=1e-6)
