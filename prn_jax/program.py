"""What every program shares: flags, help, log lines, errors of one line, exit statuses."""

import contextlib
import errno
import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable
from importlib import metadata

from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_flags.tuple_parser import TupleParser

from prn_jax.errors import Interrupted, UserError, field_line, shown

_PACKAGE = pathlib.Path(__file__).resolve().parent
_CONFIGS = _PACKAGE / "configs"
_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LIBRARY_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
flags.disclaim_key_flags()  # what is defined here belongs to the program that asks for it


class _Tuple(flags.ArgumentParser):
    """Reads a field of several values as ml_collections does.

    With ml_collections' own parser a repeated override appends to the one before.
    """

    def parse(self, argument):
        return TupleParser().parse(argument)


config_flags.register_flag_parser_for_type(tuple, _Tuple())


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines `--config`, a file or the name of one in the package, and its fields' overrides.

    Args:
      default: a name; None: the flag is to be marked as required.
    """
    try:
        return config_flags.DEFINE_config_file(
            "config",
            _config_file(default) if default else None,
            f"A file, or one of {', '.join(config_names())}. Its fields, which "
            f"{_CONFIGS / 'default.py'} explains, are overridden as --config.batch_size=16.",
        )
    except flags.CantOpenFlagFileError as error:  # ml_collections looks for fields in them
        fail(str(error).removeprefix("ERROR:: "))


def config_names() -> list[str]:
    """The configurations that the package brings, by their files' names."""
    files = sorted(_CONFIGS.glob("*.py"))
    return [path.stem for path in files if "def get_config(" in path.read_text("utf-8")]


def _config_file(name: str) -> str:
    """The file of a configuration that the package brings; anything but a bare name is one."""
    known = ", ".join(config_names())
    if not re.fullmatch(r"[\w-]+", name):
        if not os.path.isfile(name.split(":", 1)[0]):  # what follows is get_config's argument
            fail(f"--config={name}: no such file; give another, or one of {known}")
        return name
    if name not in config_names():
        fail(f"--config={name}: there are {known}; or give a file, {name}.py")
    return str(_CONFIGS / f"{name}.py")


def _config_first(arguments: list[str]) -> list[str]:
    """The arguments, the configuration before its fields' overrides, its name replaced by its file.

    ml_collections refuses an override that precedes the configuration.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    configs, others = [], []
    rest = iter(arguments[:end])
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            others.append(argument)
        elif (value := value if equals else next(rest, None)) is None:
            others.append(argument)  # absl says that its value is missing
        else:
            configs.append(f"--config={_config_file(value)}")
    return [*configs, *others, *arguments[end:]]


def _with_flagfiles(arguments: list[str]) -> list[str]:
    """The arguments, those of a `--flagfile` in its place: what passes them on needs them."""
    try:
        return flags.FLAGS.read_flags_from_files(arguments)
    except flags.CantOpenFlagFileError as error:
        fail(str(error).removeprefix("ERROR:: "))


def run(main: Callable[..., None], positional: bool = False, afterwards: str = "") -> None:
    """Runs a program whose flags are defined, and exits.

    The status is 0; 1 after one line that says what to mend; 143 after SIGTERM and 130 after
    Ctrl-C, as job systems expect; 141 where nobody reads what is printed.

    Args:
      main: called when the flags are parsed: without arguments, or with the list of those that
        are no flags.
      positional: whether there may be any.
      afterwards: what can be done when it was stopped, for the message.
    """
    # The start-up notes of TensorFlow's and XLA's C++ tell a user nothing; what fails raises an
    # exception.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    _open_streams()
    if _wants_help(sys.argv[1:]):
        print(_help(sys.modules[main.__module__]))
        sys.exit()
    leave_convs_to_eigen()
    _use_huge_pages()
    sys.argv[1:] = _config_first(_with_flagfiles(sys.argv[1:]))
    app.run(
        lambda rest: _guarded(lambda: main(rest[1:]) if positional else main(), afterwards),
        flags_parser=lambda argv: _parse(argv, positional),
    )


def _open_streams() -> None:
    """Gives a process that was started without some of them its standard streams, to nowhere.

    A file that is opened later would take their numbers, and the messages of libraries. And in a
    locale of few characters a name is escaped rather than an error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the least number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))
    sys.stdout.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Sends to nowhere what is printed from now on, where nobody reads: Python would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave_convs_to_eigen() -> None:
    """On CPUs: keeps XLA from giving convs to YNNPACK, as jaxlib 0.10.1 began to.

    Its convs take 1.2 to 1.8 times as long as those of Eigen, and their gradients by the kernel up
    to four times (docs/benchmarks.md). XLA reads its flags when a backend starts, and ends the
    process where it does not know one: hence the version.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if _LIBRARY_FUSIONS not in given and metadata.version("jaxlib").startswith("0.10."):
        ours = f"--{_LIBRARY_FUSIONS}=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
        os.environ["XLA_FLAGS"] = f"{given} {ours}".strip()


def _use_huge_pages() -> None:
    """Starts the process anew with its memory in huge pages, where Linux leaves it to programs.

    XLA allocates the buffers of each step anew: on a CPU the step spends a tenth of its time, a
    small network's inference a fifth, on being given pages of 4 kB (docs/benchmarks.md). glibc
    reads its tunables when a process starts, and only then.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    with contextlib.suppress(OSError):
        if "glibc.malloc.hugetlb" in tunables or "[madvise]" not in _HUGE_PAGES.read_text():
            return
        ours = "glibc.malloc.hugetlb=1"
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:{ours}" if tunables else ours
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _wants_help(arguments: list[str]) -> bool:
    flags_given = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(x in ("--help", "-help", "-h", "-?") for x in flags_given)


def _help(program: types.ModuleType) -> str:
    """What a program is for, and each of its flags."""
    name = sys.argv[0] if program.__name__ == "__main__" else program.__name__
    described = flags.FLAGS.module_help(name).split("\n", 1)[1]
    heading = "Flags (--helpfull: those of absl, and every field):"
    return f"{program.__doc__.rstrip()}\n\n{heading}\n\n{described}"


def _guarded(main: Callable[[], None], afterwards: str) -> None:
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(python_logging.Formatter("%(message)s"))
    logging.get_absl_handler().addFilter(_ours)
    # A write that fails leaves half-done coroutines in Orbax's threads, each with its complaint.
    python_logging.getLogger("asyncio").disabled = True
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _report_unraisable
    stopped = "; ".join(filter(None, ("{}", afterwards)))

    def terminated(*_):
        """SIGTERM where nothing is to be saved; the training's loop has a handler of its own."""
        raise Interrupted(stopped.format("terminated"))

    with contextlib.suppress(ValueError):  # only the main thread gets signals
        signal.signal(signal.SIGTERM, terminated)
    try:
        main()
    except UserError as error:
        fail(str(error))
    except Interrupted as interruption:
        _exit(str(interruption), 128 + interruption.number)
    except KeyboardInterrupt:
        _exit(stopped.format("interrupted"), 128 + signal.SIGINT)
    except BrokenPipeError:
        discard_output()
        _exit("nobody reads what is printed any more", 128 + signal.SIGPIPE)
    except Exception as error:
        if not (message := _explained(error)):
            raise
        fail(message)
    _leave()


def _explained(error: Exception) -> str | None:
    """What the machine lacks, as one line; None for what is a mistake of ours."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{shown(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}: free some, or set TMPDIR to another folder for temporary files"
    if isinstance(error, MemoryError):
        return "the computer's memory does not suffice: give a smaller image_size or fewer images"
    if "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
        wanted = re.search(r"[Oo]ut of memory[^.]*?(\d[\d.]*) ?([KMGT]i?B|bytes)", str(error))
        asked = f" ({wanted[1]} {wanted[2]} were asked for)" if wanted else ""
        return (
            f"the device's memory does not suffice{asked}: lower batch_size, eval_batch_size or "
            "image_size, or set dtype=bfloat16"
        )
    return None


def _leave() -> None:
    """Disconnects from the other processes of a run while all of them are there.

    JAX would do so when the interpreter ends, and another may be gone by then.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        jax.distributed.shutdown()


def fail(message: str) -> None:
    """Prints one line and exits with status 1."""
    _exit(f"error: {message}", 1)


def _exit(message: str, status: int) -> None:
    print(re.sub(r"\s*\n\s*", " ", message.strip()), file=sys.stderr, flush=True)
    sys.unraisablehook = lambda _: None  # of objects that the exit cuts short
    _leave()
    sys.exit(status)


def _ours(record: python_logging.LogRecord) -> bool:
    """Our lines, and others' warnings."""
    # JAX warns of each plugin without its hardware. Orbax warns of what it was not asked for, and
    # like CLU it logs errors that it raises as well.
    theirs = any(x in record.pathname for x in ("/orbax/", "/clu/asynclib"))
    if theirs or "Unable to initialize backend" in record.getMessage():
        return False
    if record.levelno >= python_logging.WARNING:
        return True
    return pathlib.Path(record.pathname).resolve().is_relative_to(_PACKAGE)


def _report_unraisable(unraisable) -> None:
    error = unraisable.exc_value
    if isinstance(error, Interrupted | KeyboardInterrupt):
        # Asked to stop amid a callback, as JAX has one in the garbage collection, where an
        # exception ends nothing: asked again when that is over.
        number = getattr(error, "number", signal.SIGINT)
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    elif str(error) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _parse(argv: list[str], positional: bool) -> list[str]:
    """Parses flags; an unknown or malformed one is one line that names the nearest real one."""
    try:
        rest = flags.FLAGS(argv)
    except AttributeError as error:
        fail(f"no such config field: {field_line(error)}")
    except (flags.Error, OSError, ValueError, TypeError, KeyError) as error:
        fail(f"{error} (see --help)")
    if len(rest) > 1 and not positional:
        fail(f"unexpected argument {rest[1]!r}; fields are overridden as --config.name=value")
    return rest
