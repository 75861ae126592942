"""What every program in `launch/` shares: flags, log lines, and errors of one line."""

import contextlib
import logging as python_logging
import os
import signal
import sys
import warnings
from collections.abc import Callable

from absl import app, flags, logging

from prn_jax.errors import Interrupted, UserError


def run(main: Callable[..., None], positional: bool = False) -> None:
    """Runs a program whose flags are defined: exits 0, or 1 after one line that says what to mend.

    Args:
      main: called when the flags are parsed: without arguments, or with the list of those that
        are no flags.
      positional: whether there may be any.
    """
    # The start-up notes of TensorFlow's C++ tell a user nothing; what fails raises an exception.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    app.run(
        lambda rest: _guarded(lambda: main(rest[1:]) if positional else main()),
        flags_parser=lambda argv: _parse(argv, positional),
    )


def _guarded(main: Callable[[], None]) -> None:
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(python_logging.Formatter("%(message)s"))
    logging.get_absl_handler().addFilter(_ours)
    # A write that fails leaves half-done coroutines in Orbax's threads, each with its complaint.
    python_logging.getLogger("asyncio").disabled = True
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _report_unraisable
    with contextlib.suppress(ValueError):  # only the main thread gets signals
        signal.signal(signal.SIGTERM, _terminated)
    try:
        main()
    except UserError as error:
        fail(str(error))
    except Interrupted as interruption:
        print(interruption, file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last checkpoint")
    _leave()


def _leave() -> None:
    """Parts from the other processes of a run, which end about now.

    JAX would do so at the very end, when one may have been taken to pieces long before another.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        jax.distributed.shutdown()


def fail(message: str) -> None:
    """Prints one line and exits with status 1."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.unraisablehook = lambda _: None  # of objects that the exit cuts short
    _leave()
    sys.exit(1)


def _terminated(*_) -> None:
    """SIGTERM where nothing is to be saved; while training, the loop has a handler of its own."""
    raise Interrupted("terminated; the same command goes on from the last checkpoint")


def _ours(record: python_logging.LogRecord) -> bool:
    """Our lines, and others' warnings."""
    # JAX warns of each plugin without its hardware. Orbax warns of what it was not asked for and
    # logs errors that it raises as well.
    if "Unable to initialize backend" in record.getMessage() or "/orbax/" in record.pathname:
        return False
    return record.levelno >= python_logging.WARNING or "prn_jax" in record.pathname


def _report_unraisable(unraisable) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _parse(argv: list[str], positional: bool) -> list[str]:
    """Parses flags; an unknown or malformed one is one line that names the nearest real one."""
    try:
        rest = flags.FLAGS(argv)
    except AttributeError as error:
        # ml_collections names the nearest field in the text of an AttributeError.
        text = str(error).strip("'\"").replace("\\'", "'").replace("\\n", ": ")
        fail(f"no such config field: {text}")
    except (flags.Error, OSError, ValueError, TypeError, KeyError) as error:
        fail(f"{error} (see --help)")
    if len(rest) > 1 and not positional:
        fail(f"unexpected argument {rest[1]!r}; fields are overridden as --config.name=value")
    return rest
