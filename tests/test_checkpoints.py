import dataclasses
import shutil
import types

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from prn_jax import mesh as meshes
from prn_jax.checkpoints import Checkpoints, digest
from prn_jax.errors import UserError
from prn_jax.identity import Identity

MADE_OF = Identity("folder", "bolt", "abc", ("test/bent/1",), 12, 4095, {"seed": 0})


@pytest.fixture
def tree():
    mesh = meshes.create_mesh()
    rng = np.random.default_rng(0)
    return meshes.replicate(mesh, {"a": {"kernel": rng.random((3, 4))}, "b": rng.random(5)})


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


def test_what_is_saved_comes_back_and_old_ones_go(tree, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest_step() is None
    for step in (1, 2, 3):
        now = tree | {"b": tree["b"] + (3 - step)}
        checkpoints.save(step, now, {"step": tree["b"]}, dataclasses.replace(MADE_OF, steps=step))
        checkpoints.wait()
    assert checkpoints.latest_step() == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    model, optimizer = checkpoints.restore(tree, {"step": tree["b"]})
    assert same(model, tree)
    assert same(optimizer, {"step": tree["b"]})
    assert checkpoints.identity() == dataclasses.replace(MADE_OF, steps=3)
    assert checkpoints.identity(2) == dataclasses.replace(MADE_OF, steps=2)
    assert same(checkpoints.restore_model(), tree)
    for before in (
        checkpoints.restore_model(2),
        checkpoints.restore(tree, {"step": tree["b"]}, step=2)[0],
    ):
        assert same(before, tree | {"b": tree["b"] + 1})
    checkpoints.close()


def test_saving_leaves_the_count_of_steps_to_stop_at_alone(tree, tmp_path, monkeypatch):
    """JAX remembers the last number that it was asked about: `progress.Termination` asks."""
    asked = []
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda x: bool(asked.append(x))
    )
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        checkpoints.save(step, tree, {"step": tree["b"]}, MADE_OF)
    checkpoints.wait()
    checkpoints.close()
    assert checkpoints.latest_step() == 2
    assert asked == []


def test_a_network_is_known_again_by_its_arrays_alone(tmp_path):
    rng = np.random.default_rng(0)
    network = {"params": {"kernel": rng.random((3, 4), np.float32)},
               "prototypes": {"scale_0": {"maps": rng.random(5, np.float32)},
                              "interest": {"mask": np.ones((2, 2), np.uint8)}}}  # fmt: skip
    placed = meshes.replicate(meshes.create_mesh(), network)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, placed, {"step": placed["params"]}, MADE_OF)
    checkpoints.wait()
    known = digest(network)
    assert digest(placed) == digest(checkpoints.restore_model(1)) == known
    network["prototypes"]["interest"]["mask"][0] = 0  # may be another when it is evaluated again
    assert digest(network) == known
    network["params"]["kernel"][0, 0] += 1e-6
    assert digest(network) != known


def test_saving_what_every_device_holds_compiles_nothing(tmp_path):
    mesh, compiled = meshes.create_mesh(), []
    tree = {"a": meshes.replicate(mesh, np.random.default_rng(0).random((8 * mesh.size, 3)))}
    checkpoints = Checkpoints(tmp_path)
    jax.monitoring.register_event_duration_secs_listener(lambda *event, **_: compiled.append(event))
    try:
        checkpoints.save(1, tree, tree, MADE_OF)
        checkpoints.close()
        assert not [name for name, _ in compiled if "compile" in name]
        jax.jit(lambda x: x + 1).lower(1).compile()  # what is listened to
        assert [name for name, _ in compiled if "compile" in name]
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("item", ["config", "model"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_an_incomplete_copy_is_named(tree, tmp_path, item, how):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, tree, tree, MADE_OF)
    checkpoints.close()
    if how == "missing":
        shutil.rmtree(tmp_path / "3" / item)
    else:
        for path in (tmp_path / "3" / item).rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    checkpoints = Checkpoints(tmp_path)
    read = checkpoints.identity if item == "config" else checkpoints.restore_model
    with pytest.raises(UserError, match=r"/3 cannot be read \(.*copy it once more") as error:
        read()
    assert "tensorstore_spec" not in str(error.value)
    checkpoints.close()


def test_an_unfinished_save_is_no_checkpoint(tree, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, tree, {"step": tree["b"]}, MADE_OF)
    checkpoints.close()
    # What a process killed while it saves leaves: Orbax's temporary folder.
    unfinished = tmp_path / "9.orbax-checkpoint-tmp-123"
    unfinished.mkdir()
    (unfinished / "half").write_text("")
    again = Checkpoints(tmp_path)
    assert again.latest_step() == 5
    assert same(again.restore_model(), tree)
    again.close()
    assert not unfinished.exists()


def test_an_unwritable_folder_is_one_line_and_keeps_what_is_there(tree, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*file.*another --workdir"):
        Checkpoints(blocked / "checkpoints")
    assert blocked.read_text() == "in the way"


def test_too_little_room_is_one_line_and_keeps_earlier_checkpoints(tree, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree, {"step": tree["b"]}, MADE_OF)
    needed = sum(x.nbytes for x in jax.tree.leaves((tree, tree["b"])))
    full = lambda _: types.SimpleNamespace(free=needed - 1)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(UserError, match=r"0 MiB are needed and 0 MiB are free; free some space"):
        checkpoints.save(2, tree, {"step": tree["b"]}, MADE_OF)
    assert checkpoints.latest_step() == 1
    assert same(checkpoints.restore_model(), tree)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=needed))
    checkpoints.save(2, tree, {"step": tree["b"]}, MADE_OF)
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_changed_fields_are_named_and_free_ones_are_not():
    def made_of(**config):
        return dataclasses.replace(MADE_OF, config=config)

    saved = made_of(seed=0, log_every=10, optimizer={"learning_rate": 0.1})
    saved.check(made_of(seed=0, log_every=1, optimizer={"learning_rate": 0.1}), "here")
    changed = made_of(seed=1, log_every=10, optimizer={"learning_rate": 0.1}, new=3)
    with pytest.raises(UserError, match=r"new was 'absent', is 3; seed was 0, is 1"):
        saved.check(changed, "here")
