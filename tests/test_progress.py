"""What a training says while it runs, and how it is asked to stop."""

import signal

import jax
import jax.numpy as jnp
import pytest

from configs import default
from prn_jax import progress


def test_one_step_runs_and_one_waits_however_slow_they_are():
    config = default.get_config()
    config.log_every = 100
    matrix = jnp.ones((300, 300)) / 300
    step = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, x: x @ matrix, x * matrix).mean())
    shown = progress.Progress(config, 0, 9, lambda x: 0.0 * x, lambda *_: None)
    before = jax.block_until_ready(step(1.0))
    for number in range(1, 7):
        loss = step(before)
        shown.update(number, {"loss": loss, "smooth_l1": 0.0, "focal": 0.0})
        assert before.is_ready()
        before = loss
    assert not loss.is_ready()  # the device has work while the host makes the next batch


def test_a_second_ctrl_c_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with progress.Termination() as asked:
        assert not asked.requested()
        signal.raise_signal(signal.SIGINT)
        assert asked.requested()
        assert asked.number == signal.SIGINT
        assert "Ctrl-C again stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
