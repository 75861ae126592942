"""The built-in demo data."""

import numpy as np
import pytest
from PIL import Image

from prn_jax import datasets
from prn_jax.datasets import demo
from prn_jax.errors import UserError


def prepare(folder, category):
    return datasets.prepare("demo", category, manual_dir="", data_dir=folder)


def _read(builder, split: str) -> list[dict]:
    return list(builder.as_dataset(split=split).as_numpy_iterator())


@pytest.mark.parametrize("category", ["gravel", "brick", "grass"])
def test_demo(tmp_path, category):
    builder = prepare(tmp_path, category)
    train, test = _read(builder, "train"), _read(builder, "test")
    assert not any(record["label"] or record["mask"].any() for record in train)
    kinds = [record["defect"].decode() for record in test]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"good": 20} | dict.fromkeys(
        demo.KINDS, 10
    )
    for record in train + test:
        assert record["image"].shape == (128, 128, 3)
        assert bool(record["mask"].any()) == (record["defect"] != b"good")


def test_demo_masks_are_what_changed():
    image = np.asarray(Image.open(demo.Demo.sources("")["gravel"]))[:128, :128]
    for kind in demo.KINDS:
        for seed in range(5):
            changed, mask = demo.add_defect(image, kind, np.random.default_rng(seed))
            again, _ = demo.add_defect(image, kind, np.random.default_rng(seed))
            np.testing.assert_array_equal(changed, again)
            difference = np.abs(changed.astype(int) - image)
            assert not difference[mask == 0].any()
            assert (difference[mask > 0] >= 10).mean() > 0.75
            assert difference[mask > 0].mean() >= 35


def test_demo_splits_share_no_pixel(tmp_path):
    photograph = np.asarray(Image.open(demo.Demo.sources("")["grass"]))
    halves = {"train": photograph[:, :312], "test": photograph[:, 320:]}
    builder = prepare(tmp_path, "grass")
    for split, half in halves.items():
        normal = [r["image"][..., 0] for r in _read(builder, split) if not r["label"]]
        rows = np.lib.stride_tricks.sliding_window_view(half, 128, axis=1).reshape(-1, 128)
        known = {row.tobytes() for row in rows}
        assert all(row.tobytes() in known for image in normal for row in image)


def test_demo_without_scikit_image(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[demo\]'"):
        prepare(tmp_path, "gravel")
