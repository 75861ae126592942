import socket

import jax
import pytest

from prn_jax import mesh
from prn_jax.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", 2, None), "belong together"),
        (("127.0.0.1:1", 2, 2), "--process_id=2: give 0 to 1"),
        (("127.0.0.1", 2, 0), "--coordinator=127.0.0.1: give host:port"),
        (("localhost:port", 2, 1), "--coordinator=localhost:port: give host:port"),
        (("127.0.0.1:1", 2, 1), "127.0.0.1:1 did not answer for 0 s .*that process 0 runs"),
    ],
)
def test_joining_a_run_that_is_not_there_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        mesh.initialize(*arguments, timeout_s=0)
    assert not jax.distributed.is_initialized()


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
