"""Checkpoints: saved by Orbax in the background; one is everything that prediction needs.

A checkpoint has three items: `model` (params, batch_stats, backbone, prototypes), `optimizer`
(its state and the step) and `config` (JSON: what the run is made of, see identity.py). Orbax writes
each under a temporary name and renames it when it is complete, so a process killed while saving
leaves the previous checkpoint whole.
"""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from prn_jax import mesh as meshes
from prn_jax.errors import UserError, first_line, is_plain, shown
from prn_jax.identity import Identity

Tree = Any


class _Manager(ocp.CheckpointManager):
    """Does not ask JAX, by the step, whether to stop.

    JAX remembers the last number that it was asked about, on whatever thread, and has all processes
    stop at the next one; `progress.Termination` asks by a count of its own, which would miss it.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run (one category), newest last.

    Args:
      folder: where they lie, local or `gs://`; absolute.
      keep: how many of the newest stay.
      read_only: nothing is ever written or tidied up: another process may be saving there.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int = 2, read_only: bool = False):
        self.folder = _GlobProof(folder) if "://" not in str(folder) else epath.Path(folder)
        with _writable(self.folder):
            self._manager = _Manager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=None if read_only else keep,
                    enable_async_checkpointing=not read_only,
                    cleanup_tmp_directories=not read_only,  # what a killed process left behind
                    read_only=read_only,
                ),
                # By handlers, for the metadata of an item that only has a name cannot be read.
                item_handlers={
                    "model": _trees(),
                    "optimizer": _trees(),
                    "config": ocp.JsonCheckpointHandler(),
                },
            )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, model: Tree, optimizer: Tree, identity: Identity) -> None:
        """Starts to save; returns when the arrays are copied from the device.

        Raises:
          UserError: there is no room, or the checkpoint before this one could not be written.
        """
        self.wait()
        self._check_room((model, optimizer))
        items = ocp.args.Composite(
            model=ocp.args.PyTreeSave(model),
            optimizer=ocp.args.PyTreeSave(optimizer),
            config=ocp.args.JsonSave(identity.as_json()),
        )
        with _writable(self.folder):
            self._manager.save(step, args=items)

    def _check_room(self, tree: Tree) -> None:
        """Refuses to begin what a local disk has no room for: Orbax would fail half-way."""
        if "://" in str(self.folder):
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.folder).free
        if not meshes.agree(free >= needed):
            raise _unwritable(
                self.folder, f"{needed >> 20} MiB are needed and {free >> 20} MiB are free"
            )

    def restore(self, model: Tree, optimizer: Tree, step: int | None = None) -> tuple[Tree, Tree]:
        """Reads a checkpoint (the newest by default) into trees like the given ones.

        The given leaves, arrays or `jax.ShapeDtypeStruct`s with a sharding, say where each array
        is to lie.

        Raises:
          UserError: the checkpoint's arrays are others, or cannot be read.
        """
        step = self.latest_step() if step is None else step
        items = ocp.args.Composite(model=_into(model), optimizer=_into(optimizer))
        try:
            restored = self._manager.restore(step, args=items)
        except (ValueError, KeyError, TypeError, OSError) as error:
            folder = self.folder / str(step)
            raise UserError(
                f"{shown(folder)} is damaged or of another network than the configuration's: set "
                "its fields back, give another --workdir, or remove this folder to go on from the "
                "checkpoint before it"
            ) from error
        return restored.model, restored.optimizer

    def restore_model(self, step: int | None = None) -> Tree:
        """Reads only what prediction needs, onto one device."""
        step = self.latest_step() if step is None else step
        # Whatever devices saved it: everything comes to one that is here.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        with self._readable(step):
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                self._manager.item_metadata(step).model,
            )
            items = ocp.args.Composite(model=_into(abstract))
            return self._manager.restore(step, args=items).model

    def identity(self, step: int | None = None) -> Identity:
        """What a checkpoint (the newest by default) was made of."""
        items = ocp.args.Composite(config=ocp.args.JsonRestore())
        step = self.latest_step() if step is None else step
        with self._readable(step):
            return Identity.from_json(self._manager.restore(step, args=items).config)

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Says of a checkpoint that cannot be read what to do."""
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            why, *_ = first_line(error).split(" [tensorstore_spec=")  # of a thousand letters
            raise UserError(
                f"{shown(self.folder / str(step))} cannot be read ({why}): where it "
                "is damaged or not complete, copy it once more, or remove this folder, and the "
                "checkpoint before it counts"
            ) from error

    def num_prototypes(self) -> int | None:
        """Clusters of the newest checkpoint's normal images, None without one."""
        step = self.latest_step()
        if step is None:
            return None
        with self._readable(step):
            stored = self._manager.item_metadata(step).model["prototypes"]
            # Without training a scale has one prototype; an earlier version had no `whole`.
            whole = stored.get("whole", {"centres": stored["scale_0"]["maps"]})
            return whole["centres"].shape[0]

    def wait(self) -> None:
        """Waits until what is being saved is on disk."""
        with _writable(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and frees the background threads."""
        with _writable(self.folder):
            self._manager.close()


def digest(network: Tree) -> str:
    """Tells a network's arrays, as `Checkpoints.restore_model` gives them, from another's.

    Without the region of interest, which stays as it was when they were fitted.
    """
    found = hashlib.sha256()
    prototypes = {name: x for name, x in network["prototypes"].items() if name != "interest"}
    leaves = jax.tree_util.tree_leaves_with_path(network | {"prototypes": prototypes})
    for path, leaf in leaves:
        array = np.ascontiguousarray(jax.device_get(leaf))
        found.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        found.update(array.data)
    return found.hexdigest()


def check_name(folder: str | os.PathLike) -> None:
    """Refuses a folder whose name TensorStore does not take as it is, before anything is computed.

    Raises:
      UserError: naming it.
    """
    if os.path.basename(os.fspath(folder)) in ("results.json", "results.md"):
        raise UserError(
            f"{shown(folder)}: the results are called so, and no category may be; rename its folder"
        )
    if not is_plain(os.fspath(folder)):
        raise UserError(
            f"no checkpoint can be written to {shown(folder)}: its name holds a backslash, a "
            "control character or bytes that are not UTF-8; rename the folder, or give another "
            "--workdir"
        )


def holds_checkpoints(folder: pathlib.Path | epath.Path) -> bool:
    """Whether a folder has checkpoints in it, complete or not."""
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def newest_identity(folder: epath.Path) -> tuple[int, Identity] | None:
    """The newest checkpoint's step and what it was made of; None where neither can be read.

    Without Orbax, which starts JAX's devices: a process that trains beside this one wants them.
    """
    if not holds_checkpoints(folder):
        return None
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    try:
        stored = json.loads((folder / str(step) / "config" / "metadata").read_text())
        return step, Identity.from_json(stored)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def folder_of(run: epath.Path) -> epath.Path:
    """Where the checkpoints of a run lie: in `checkpoints` below it, or in the folder itself."""
    below = run / "checkpoints"
    return below if below.exists() else run


def check_outside(path: str | os.PathLike, flag: str) -> None:
    """Refuses to write among a run's checkpoints: each folder there is taken for one.

    Args:
      path: where something is to be written.
      flag: that gave it, for the message.

    Raises:
      UserError: it lies there, or is that folder itself.
    """
    place = pathlib.Path(os.path.realpath(os.path.expanduser(path)))
    for folder in (place, *place.parents):
        if folder.name == "checkpoints" and holds_checkpoints(folder):
            raise UserError(
                f"{flag}={shown(path)}: nothing else may lie among the checkpoints in "
                f"{shown(folder)}; give another place"
            )


def _trees() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of trees of arrays, each saved by one of the devices that hold it whole.

    By default each of them saves a slice: a small program for each array and device to compile,
    hundreds before the first checkpoint (google/orbax, issue 2934), for some megabytes here.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    numpy = ocp.type_handlers.NumpyHandler()
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, numpy)
        )
    )


def _into(tree: Tree) -> ocp.args.PyTreeRestore:
    """Asks for arrays of the shapes, types and devices of these leaves."""
    return ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))


class _GlobProof(type(epath.Path("/"))):
    """A local path below which Orbax finds its files, whatever the folders are called.

    etils takes `[2]` in the name of a folder for a part of the pattern.
    """

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        return (self / found for found in glob.glob(pattern, root_dir=os.fspath(self)))


@contextlib.contextmanager
def _writable(folder: epath.Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into one clear line."""
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from error
    except ImportError as error:
        if "google" not in str(error):
            raise
        raise UserError(
            f"{shown(folder)}: Orbax wants google-cloud-storage for checkpoints in a bucket: "
            "pip install 'prn-jax[gcs]'"
        ) from error
    except ValueError as error:
        # TensorStore's errors begin with a status and end with what the system said.
        if not re.match("[A-Z_]+: ", str(error)):
            raise
        reason = str(error).rpartition(": ")[2].partition(" [")[0]
        raise _unwritable(folder, reason) from error


def _unwritable(folder: epath.Path, reason: str) -> UserError:
    return UserError(
        f"cannot write checkpoints to {shown(folder)}: {reason}; "
        "free some space or give another --workdir (earlier checkpoints are kept)"
    )
