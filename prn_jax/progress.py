"""What a training says while it runs, and how it is asked to stop."""

import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from prn_jax import mesh as meshes
from prn_jax.errors import UserError


class Progress:
    """Losses, learning rate, images/s and the time to go: a bar on a terminal, else lines.

    Args:
      config: see configs/default.py.
      start: steps done before.
      steps: of the whole training.
      schedule: of the learning rate.
      write_scalars: receives the step and the means since the last log step.
    """

    def __init__(
        self,
        config: ConfigDict,
        start: int,
        steps: int,
        schedule: optax.Schedule,
        write_scalars: Callable[[int, dict[str, float]], None],
    ):
        self._config, self._steps, self._write_scalars = config, steps, write_scalars
        # All at once: asked for later, each would wait on the device for the steps before it.
        self._rates = np.asarray(schedule(np.arange(steps)))
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not (meshes.is_main() and sys.stderr.isatty()),
        )
        self._mark: tuple[int, float] | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def update(self, step: int, values: dict[str, jax.Array]) -> None:
        """Notes a step's losses and waits for the step before; reports at log steps.

        One step runs and the next is made ready, no more: who asks to stop waits for these alone.
        """
        jax.block_until_ready(self._pending[-1:])
        self._pending.append((step, values))
        self._bar.update()
        if self._mark is None:
            # The first step compiles; the pace is measured from its end.
            jax.block_until_ready(values)
            self._mark = (step, time.monotonic())
        if step % self._config.log_every == 0 or step == self._steps:
            # All but the newest are done or nearly: the device is never left without work.
            self._report(step, self._fetch(keep=0 if step == self._steps else 1))

    def paused(self, work: Callable, *of: Any) -> None:
        """Does other work between two steps, which the pace does not count."""
        began = time.monotonic()
        work(*of)
        if self._mark is not None:
            self._mark = (self._mark[0], self._mark[1] + time.monotonic() - began)

    def check(self, step: int) -> None:
        """Raises unless every loss up to this step is finite."""
        self._fetch(keep=0, consume=False)

    def _fetch(self, keep: int, consume: bool = True) -> list[tuple[int, dict[str, float]]]:
        """The losses of the steps noted but for the newest `keep`; waits for them."""
        count = len(self._pending) - keep
        fetched = jax.device_get(self._pending[:count])
        for step, values in fetched:
            for name, value in values.items():
                if not np.isfinite(value):
                    clip = "" if self._config.optimizer.clip else "set optimizer.clip=0.05, "
                    raise UserError(
                        f"{name} is {value} at step {step}; nothing was saved since it was finite. "
                        f"Lower optimizer.learning_rate, {clip}or set dtype=float32"
                    )
        if consume:
            self._pending = self._pending[count:]
        return fetched

    def _report(self, step: int, fetched: list[tuple[int, dict[str, float]]]) -> None:
        if not fetched:
            return
        now = time.monotonic()
        names = fetched[0][1]
        means = {name: float(np.mean([values[name] for _, values in fetched])) for name in names}
        # The newest steps may still be running: the pace is that of those that are done.
        since, began = self._mark
        done = fetched[-1][0]
        scalars = means | {"learning_rate": float(self._rates[step - 1])}
        pace = ""
        if done > since:
            seconds = (now - began) / (done - since)
            scalars["images_per_second"] = self._config.batch_size / seconds
            to_go = duration((self._steps - done) * seconds)
            pace = f"  {scalars['images_per_second']:.1f} images/s  ETA {to_go}"
        self._write_scalars(step, scalars)
        self._mark = (done, now)
        line = (
            f"step {step}/{self._steps}  loss {means['loss']:.4f} "
            f"(smooth L1 {means['smooth_l1']:.4f}, focal {means['focal']:.5f})  "
            f"lr {scalars['learning_rate']:.2e}{pace}"
        )
        if self._bar.disable:
            logging.info("%s", line)
        else:
            self._bar.set_postfix_str(f"loss {means['loss']:.4f}")
            if step == self._steps:
                tqdm.write(line, file=sys.stderr)


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# JAX stops at a number that it is asked about; categories, whose steps begin anew, share one count.
_asked = itertools.count(1)


class Termination:
    """Notices SIGTERM (preemption, `kill`, a job's time limit) or Ctrl-C; the step is finished.

    A second Ctrl-C stops at once.

    Attributes:
      number: of the signal.
    """

    def __enter__(self):
        self.number, self._came = signal.SIGTERM, False
        self._previous = {}
        # With several hosts JAX's own notice of SIGTERM makes all agree on the step.
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        with contextlib.suppress(ValueError):  # not the main thread: nobody can send us a signal
            for number in numbers:
                if signal.getsignal(number) != signal.SIG_IGN:  # as behind a shell's &
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        if self._came and number == self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number, self._came = number, True
        if number == signal.SIGINT:  # No print: it may be what was interrupted.
            os.write(2, b"\nsaving after this step; Ctrl-C again stops at once\n")

    def requested(self) -> bool:
        """Whether to save and stop after this step; the same on every process, once for each."""
        if jax.process_count() == 1:
            return self._came
        return multihost_utils.reached_preemption_sync_point(next(_asked))
