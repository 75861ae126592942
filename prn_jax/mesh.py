"""Devices and hosts: the mesh, what lies where, and the start of a multi-host run.

There is one mesh axis, `data`. Images are split along it; parameters, prototypes and statistics
are the same on each device. Batch sizes are global: over all devices of all hosts.
"""

import importlib.util
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prn_jax.errors import UserError

Tree = Any


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of a multi-host run; alone, does nothing.

    Without arguments the environment decides: Cloud TPU, Slurm and Open MPI are recognised by
    `jax.distributed.initialize` itself. Call it before anything touches a device.

    Args:
      coordinator: `host:port` of process 0.
      num_processes: processes of the run.
      process_id: this one's number, from 0.

    Raises:
      UserError: some but not all arguments are given, or the coordinator does not answer.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num_processes and --process_id belong together")
    if not any(given) and not _many_hosts():
        return
    if jax.config.jax_cpu_collectives_implementation is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"cannot join the run at coordinator {coordinator or '(auto-detected)'}: {first_line}; "
            "check that process 0 runs and that its port is open"
        ) from error


def _many_hosts() -> bool:
    """Whether the environment says that this process is one of several."""
    for variable in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(variable, "1")) > 1:
            return True
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    # A Cloud TPU VM: its hosts find each other through the metadata server.
    has_tpu = pathlib.Path("/dev/accel0").exists() or pathlib.Path("/dev/vfio/0").exists()
    return has_tpu and importlib.util.find_spec("libtpu") is not None


def create_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices of all hosts (or the given ones) along the axis `data`."""
    return Mesh(np.array(jax.devices() if devices is None else devices), ("data",))


def is_main() -> bool:
    """Whether this process writes logs and results."""
    return jax.process_index() == 0


def check_batch_size(field: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless the global batch divides among the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(
            f"{field}={batch_size} cannot be divided among {mesh.size} devices: "
            f"give a multiple of {mesh.size}"
        )


def shard(mesh: Mesh, tree: Tree) -> Tree:
    """Host-local NumPy arrays -> global arrays, split along axis 0 over `data`.

    Each process gives its own part; process 0's comes first.
    """
    sharding = NamedSharding(mesh, P("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def shard_same(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """An array that every process holds whole -> a global array, split along axis 0."""
    sharding = NamedSharding(mesh, P("data"))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Arrays that every process holds -> global arrays, whole on each device."""
    sharding = NamedSharding(mesh, P())

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def gather(array: jax.Array) -> np.ndarray:
    """A global array, however it is split -> NumPy, whole, on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def barrier(name: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(flag: bool) -> bool:
    """Process 0's answer, on every process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))
