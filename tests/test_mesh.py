import contextlib
import hashlib
import json
import random
import socket
import sys

import jax
import numpy as np
import pytest
from etils import epath

from prn_jax import mesh, progress
from prn_jax.errors import UserError
from tests.processes import execute, finish, start

MEET = """
from prn_jax import mesh
mesh.initialize()
import jax
import numpy as np
me = jax.process_index()
# What each has computed by itself: process 0's is everybody's.
mine = {"maps": np.float32([0.1 + me]), "mask": np.uint8([[255, me]])}
every = mesh.replicate(mesh.create_mesh(), mine)
print(*(np.asarray(every[x]).tolist() for x in ("maps", "mask")))
print(jax.process_count(), me, mesh.agree(me == 0))
"""


def slurm(number, job):
    return {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number),
    }  # fmt: skip


def open_mpi(number, job):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(number), "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
    }  # fmt: skip


@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_processes_find_each_other_by_what_the_launcher_sets(launcher):
    job = random.randrange(4096)  # of which the port follows
    processes = [start([sys.executable, "-c", MEET], **launcher(i, job)) for i in range(2)]
    _, outputs, logs = finish(processes)
    found = [text.splitlines()[-2:] for text in outputs]
    same = "[0.10000000149011612] [[255, 0]]"
    assert found == [[same, "2 0 True"], [same, "2 1 True"]], logs


def test_a_launcher_that_says_too_little_is_one_line():
    result = meet(OMPI_COMM_WORLD_SIZE="2")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "UserError: cannot join the other processes: " in last
    assert "; give --coordinator, --num_processes and --process_id" in last


def test_a_tpu_without_a_cluster_is_used_alone():
    result = meet("mesh._has_tpu = lambda: True")
    assert result.stdout.splitlines()[-1] == "1 0 True", result.stderr


def meet(before="", **variables):
    """Joins what there is to join, in a process of its own."""
    code = MEET.replace("mesh.init", f"{before}\nmesh.init")
    return execute([sys.executable, "-c", code], **variables)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", 2, None), "belong together"),
        (("127.0.0.1:1", 2, 2), "--process_id=2: give 0 to 1"),
        (("127.0.0.1", 2, 0), "--coordinator=127.0.0.1: give host:port"),
        (("localhost:port", 2, 1), "--coordinator=localhost:port: give host:port"),
        (("localhost:99999", 2, 0), "--coordinator=localhost:99999: give host:port"),
        (("127.0.0.1:1", 2, 1), "127.0.0.1:1 did not answer for 0 s .*that process 0 runs"),
    ],
)
def test_joining_a_run_that_is_not_there_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        mesh.initialize(*arguments, timeout_s=0)
    assert not jax.distributed.is_initialized()


def test_a_host_that_has_something_else_is_named(monkeypatch):
    mesh.require_same("images", ["alone"])
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    sent = []

    def alike(x):
        sent.append(x)
        return np.stack([x, x, x])

    monkeypatch.setattr(mesh.multihost_utils, "process_allgather", alike)
    mesh.require_same("images", ["a"])
    mesh.require_same("images", ["b"])
    assert (sent[0] != sent[1]).any()
    for others, message in ((["a", "a"], None), (["a", "b"], "process 2 has other images than")):
        digests = [hashlib.sha256(json.dumps([x]).encode()).digest() for x in ("a", *others)]
        gathered = np.stack([np.frombuffer(x, np.uint32) for x in digests])
        monkeypatch.setattr(mesh.multihost_utils, "process_allgather", lambda _, x=gathered: x)
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            mesh.require_same("images", ["a"])


def test_categories_share_one_count_of_steps_to_stop_at(monkeypatch):
    """JAX stops at a step: one that it was asked about before would never come again."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        progress.multihost_utils, "reached_preemption_sync_point", lambda x: asked.append(x)
    )
    for _ in range(2):
        with progress.Termination() as termination:
            for _ in range(3):
                termination.requested()
    assert asked == sorted(set(asked))
    assert len(asked) == 6


def test_a_port_in_use_is_one_line():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f":{port}: Address already in use; choose a free port"):
            mesh.initialize(f"127.0.0.1:{port}", 2, 0)


def test_alone_nothing_is_joined_and_the_work_is_done_once(monkeypatch):
    for variable in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(variable, raising=False)
    mesh.initialize()
    assert not jax.distributed.is_initialized()
    calls = []
    assert mesh.first_on_main("work", lambda: calls.append(1) or 7) == 7
    assert calls == [1]
    with pytest.raises(UserError, match="as it came"):
        mesh.first_on_main("work", _fail)


def _fail():
    raise UserError("as it came")


def test_who_has_no_place_to_keep_programs_keeps_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    kept = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        mesh.cache_compilations()
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        mesh.cache_compilations()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache/prn_jax/xla")
        # Of several processes one alone writes: there is a place that all of them see, or none.
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        for kind, expected in (("tpu", str(tmp_path / "work/.xla")), ("gpu", None)):
            jax.config.update("jax_compilation_cache_dir", None)
            monkeypatch.setattr(jax, "default_backend", lambda kind=kind: kind)
            mesh.cache_compilations(epath.Path(tmp_path / "work"))
            assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
