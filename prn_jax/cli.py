"""`prn-jax COMMAND`: the programs of this package under one name."""

import ast
import difflib
import importlib
import importlib.util
import pathlib
import sys

from prn_jax import __version__

COMMANDS = (
    "train",
    "preview",
    "predict",
    "watch",
    "export",
    "evaluate",
    "report",
    "study",
    "benchmark",
)


def main() -> None:
    """Runs the command that the first argument names, with the rest as its flags."""
    command, rest = sys.argv[1] if len(sys.argv) > 1 else "--help", sys.argv[2:]
    if command in COMMANDS:
        sys.argv = [f"prn-jax {command}", *rest]
        importlib.import_module(f"prn_jax.programs.{command}").run()
    elif command in ("--help", "-h", "help"):
        print(_help())
    elif command == "--version":
        print(f"prn-jax {__version__}")
    else:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        sys.exit(f"error: no command {command!r}: {hint}There are {', '.join(COMMANDS)}")


def _help() -> str:
    lines = [f"  {name:<10} {_summary(name)}" for name in COMMANDS]
    return "\n".join(
        [
            "Prototypical Residual Networks (CVPR 2023): anomaly detection in JAX.",
            "",
            "prn-jax COMMAND FLAGS...   (prn-jax COMMAND --help shows its flags; --version)",
            "",
            *lines,
        ]
    )


def _summary(command: str) -> str:
    """The first line of a program's docstring, unimported: each defines its flags as it is."""
    source = pathlib.Path(importlib.util.find_spec(f"prn_jax.programs.{command}").origin)
    return ast.get_docstring(ast.parse(source.read_text("utf-8"))).splitlines()[0]
