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


def test_the_pace_is_that_of_steps_whatever_comes_between(monkeypatch):
    now, found = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    config = default.get_config()
    config.log_every, config.batch_size = 2, 8
    shown = progress.Progress(config, 0, 8, lambda x: 0.0 * x, lambda _, x: found.append(x))
    for number in range(1, 9):
        shown.update(number, {"loss": 1.0, "smooth_l1": 0.0, "focal": 0.0})
        now[0] += 0.5
        if number in (3, 4):
            shown.paused(lambda seconds: now.__setitem__(0, now[0] + seconds), 60.0)
    paces = [x["images_per_second"] for x in found if "images_per_second" in x]
    # A step takes half a second; that of the last one, which is waited for, is none here.
    assert len(paces) >= 3
    assert all(10 < x < 40 for x in paces)


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
