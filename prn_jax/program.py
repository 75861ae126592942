"""What every program in `launch/` shares: flags, log lines, and errors of one line."""

import logging as python_logging
import os
import sys
from collections.abc import Callable

from absl import app, flags, logging

from prn_jax.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Runs a program whose flags are defined: exits 0, or 1 after one line that says what to mend.

    Args:
      main: called without arguments when the flags are parsed.
    """
    # TensorFlow's C++ start-up notes tell a user nothing; its errors still show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    app.run(lambda _: _guarded(main), flags_parser=_parse)


def _guarded(main: Callable[[], None]) -> None:
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(python_logging.Formatter("%(message)s"))
    # Orbax and JAX note each of their steps at level INFO, through absl's own logger.
    logging.get_absl_logger().addFilter(_ours)
    try:
        main()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last checkpoint")


def fail(message: str) -> None:
    """Prints one line and exits with status 1."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(1)


def _ours(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.WARNING or "prn_jax" in record.pathname


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; an unknown or malformed one is one line that names the nearest real one."""
    try:
        rest = flags.FLAGS(argv)
    except AttributeError as error:
        # ml_collections names the nearest field in the text of an AttributeError.
        text = str(error).strip("'\"").replace("\\'", "'").replace("\\n", ": ")
        fail(f"no such config field: {text}")
    except (flags.Error, OSError, ValueError, TypeError, KeyError) as error:
        fail(f"{error} (see --help)")
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; fields are overridden as --config.name=value")
    return rest
