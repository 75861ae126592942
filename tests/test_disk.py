import errno
import gc
import os
import weakref

import numpy as np
import pytest

from prn_jax import disk, input_pipeline
from prn_jax.errors import UserError
from tests.test_input_pipeline import batches, digest, make_config, make_data
from tests.trees import make_mvtec


@pytest.fixture
def all_large(monkeypatch):
    monkeypatch.setattr(disk, "LARGE", 1)


def test_a_large_array_lies_in_a_file_that_is_gone(all_large, tmp_path, monkeypatch):
    monkeypatch.setattr(disk.tempfile, "tempdir", str(tmp_path))
    array = disk.zeros((3, 5), np.int32)
    assert isinstance(array, np.memmap)
    assert array.dtype == np.int32
    assert not array.any()
    assert not list(tmp_path.iterdir())
    array[1] = np.arange(5)
    np.testing.assert_array_equal(array.sum(0), np.arange(5))


def test_a_small_array_is_held_in_memory():
    assert not isinstance(disk.zeros((3, 5), np.int32), np.memmap)


def test_rows(all_large):
    array = np.arange(24).reshape(6, 4)
    assert disk.rows(array, np.arange(6)) is array
    index = np.array([4, 0, 4])
    found = disk.rows(array, index)
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, array[index])
    assert len(disk.rows(array, np.array([], int))) == 0


def test_a_full_disk_is_said(all_large, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left on device; TMPDIR names another folder"):
        disk.zeros((3, 5), np.int32)


def test_images_on_disk_are_the_same_and_train_the_same(tmp_path, monkeypatch):
    make_mvtec(tmp_path / "raw", "bolt")
    config = make_config(**{
        "data.manual_dir": str(tmp_path / "raw"), "data.data_dir": str(tmp_path / "records"),
        "category": "bolt", "data.name": "folder", "num_seen": 1,
        "data.holdout": 0.3, "total_steps": 2,
    })  # fmt: skip
    held = input_pipeline.load_category(config, "bolt")
    monkeypatch.setattr(disk, "LARGE", 1)
    stored = input_pipeline.load_category(config, "bolt")
    assert isinstance(stored.train.image, np.memmap)
    for split in ("train", "seen", "test", "held"):
        one, other = getattr(held, split), getattr(stored, split)
        assert one.id == other.id
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.mask, other.mask)
    one, other = (digest(batches(config, x, total_steps=2)) for x in (held, stored))
    assert one == other


def test_a_pipeline_lets_go_of_its_images(all_large):
    data = make_data()
    image = weakref.ref(data.train.image)
    batches(make_config(), data, total_steps=1)
    del data
    gc.collect()
    assert image() is None
