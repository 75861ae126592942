"""How a training is asked to stop."""

import signal

import pytest

from prn_jax import progress


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
