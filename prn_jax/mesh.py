"""Devices and hosts: the mesh, what lies where, and the start of a multi-host run.

There is one mesh axis, `data`. Images are split along it; parameters, prototypes and statistics
are the same on each device. Batch sizes are global: over all devices of all hosts.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import multihost

from prn_jax.errors import UserError, first_line

Tree = Any
T = TypeVar("T")

# One process may wait for another that writes a large data set, but not for ever.
_PATIENCE_MS = 24 * 3600 * 1000


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_s: int = 300,
) -> None:
    """Joins the other processes of a multi-host run; alone, does nothing.

    Without arguments the environment decides: Cloud TPU, Slurm and Open MPI are recognised by
    `jax.distributed.initialize` itself. Call it before anything touches a device.

    Args:
      coordinator: `host:port` of process 0.
      num_processes: processes of the run.
      process_id: this one's number, from 0.
      timeout_s: seconds to wait for the others.

    Raises:
      UserError: some but not all arguments are given, or the coordinator does not answer.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num_processes and --process_id belong together")
    launched = _launched_as_one_of_many()
    if not any(given) and not launched and (not _has_tpu() or _has_one_chip()):
        return
    if coordinator is not None:
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id}: give 0 to {num_processes - 1}")
        logging.info(
            "process %d of %d: meeting the others at %s", process_id, num_processes, coordinator
        )
        _meet(coordinator, process_id, timeout_s)
    if jax.config.jax_cpu_collectives_implementation is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout_s,
            shutdown_timeout_seconds=60,  # how long one that fails alone waits for the others
        )
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and not any(given) and not launched:
            return  # JAX finds no cluster: a TPU outside Google's machines, in a notebook say
        mend = "" if coordinator else "; give --coordinator, --num_processes and --process_id"
        raise UserError(f"cannot join the other processes: {first_line(error)}{mend}") from error
    if jax.process_count() == 1:
        # JAX has taken SIGTERM, by which several agree on a step: alone, we stop by ourselves.
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def _meet(coordinator: str, process_id: int, timeout_s: int) -> None:
    """Makes sure that process 0 listens, for JAX aborts the process where nobody answers."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator}: give host:port")
    address = host.strip("[]"), int(port)
    if process_id == 0:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            socket.create_server(("", address[1]), family=family, dualstack_ipv6=both).close()
        except OSError as error:
            raise UserError(
                f"--coordinator={coordinator}: {os.strerror(error.errno)}; choose a free port"
            ) from error
        return
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(address, timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator={coordinator} did not answer for {timeout_s} s "
                    f"({error.strerror or error}): check that process 0 runs and that its port is "
                    "open"
                ) from error
        time.sleep(0.5)


def _launched_as_one_of_many() -> bool:
    """Whether a launcher says that this process is one of several."""
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return any(int(os.environ.get(name, "1")) > 1 for name in counts)


def _has_tpu() -> bool:
    """Whether this is a TPU's host; those of one slice find each other by Google's metadata."""
    has_chip = pathlib.Path("/dev/accel0").exists() or pathlib.Path("/dev/vfio/0").exists()
    return has_chip and importlib.util.find_spec("libtpu") is not None


def _has_one_chip() -> bool:
    """Whether this process of a TPU's host was given one chip, beside others: it is a run alone."""
    return os.environ.get("TPU_PROCESS_BOUNDS") == "1,1,1"


def cache_compilations(shared: epath.Path | None = None) -> None:
    """Keeps compiled programs on disk, so that the next process of their kind starts at once.

    Of several processes only process 0 writes. Those with TPUs read it in `shared`; of those with
    GPUs nothing is kept, for who compiles would wait for process 0's part in the search for
    kernels, which it skips.

    Args:
      shared: a folder that all processes see; None: this one is alone.
    """
    several, kind = jax.process_count() > 1, jax.default_backend()
    if jax.config.jax_compilation_cache_dir is not None or (several and kind == "gpu"):
        return
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    folder = pathlib.Path(os.path.expanduser(base)) / "prn_jax" / "xla"
    if several and shared is not None and kind == "tpu":
        folder = shared / ".xla"
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:  # of a container whose user has no home: JAX would warn of each program
            return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Forty small programs, below JAX's limit of a second, are most of a warm start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


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
    """Arrays that every process holds -> global arrays, whole on each device.

    Process 0's: what each has computed by itself, another kind of processor may have rounded
    otherwise, and nothing would bring the devices together again.
    """
    sharding = NamedSharding(mesh, P())
    tree = jax.tree.map(np.asarray, tree)
    if mesh.is_multi_process:
        tree = multihost_utils.broadcast_one_to_all(tree)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


def varying(tree: Tree) -> Tree:
    """Inside a mapped function: replicated arrays as each device's own.

    What is differentiated by them is summed over the devices in their type, and not in a smaller
    one to which they are rounded. Where they are not, it changes the order of sums alone.
    """
    return jax.lax.pcast(tree, "data", to="varying")


def gather(array: jax.Array) -> np.ndarray:
    """A global array, however it is split -> NumPy, whole, on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def barrier(name: str) -> None:
    """Waits until every process has come here, for hours if need be.

    Through the coordinator, for a collective on the devices would give up after seconds.
    """
    multihost.get_barrier_sync_fn()(key=name, timeout_ms=_PATIENCE_MS)


def agree(flag: bool) -> bool:
    """Process 0's answer, on every process; a collective, which all reach at about one time."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))


def from_main(name: str, work: Callable[[], T]) -> T:
    """Process 0 works; every process gets its result.

    Args:
      name: of the work, for messages.
      work: runs on process 0; returns plain JSON types.

    Raises:
      UserError: process 0's on process 0, and one that points to it on the others.
    """
    if jax.process_count() == 1:
        return work()
    text, problem = b"", None
    if is_main():
        try:
            text = json.dumps(work()).encode()
        except UserError as error:
            problem = error
    barrier(name)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(text))))
    if not size:
        raise problem or UserError(f"{name} failed on process 0, which says why")
    sent = np.frombuffer(text or bytes(size), np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))))


def first_on_main(name: str, work: Callable[[], T]) -> T:
    """Process 0 works, then the others do the same work, which finds what process 0 wrote.

    Args:
      name: of the work, for messages.
      work: runs on every process.

    Raises:
      UserError: process 0's on process 0, and one that points to it on the others.
    """
    result = problem = None
    if is_main():
        try:
            result = work()
        except UserError as error:
            problem = error
    barrier(name)
    if not agree(problem is None):
        raise problem or UserError(f"{name} failed on process 0, which says why")
    result = result if is_main() else work()
    barrier(f"{name}, on all")  # a collective would not wait as long
    return result


def require_same(name: str, content: object) -> None:
    """Makes sure that all processes have the same.

    Args:
      name: of it, for the message.
      content: of plain JSON types.

    Raises:
      UserError: on every process, naming one that has something else than process 0.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    every = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    if len(others := np.flatnonzero((every != every[0]).any(axis=1))):
        raise UserError(
            f"process {others[0]} has other {name} than process 0: give all hosts the same"
        )
