"""StableHLO, serialized by `jax.export`: for JAX on any device."""

import pathlib

import jax

from prn_jax.export.graph import Graph

NEEDS = ()
IS_EXACT = True
UNFUSED = False  # XLA fuses
# Run by check.py in a process of its own; `path` is the export.
RUNNER = """
import pathlib, jax
from jax import export
run = jax.jit(export.deserialize(bytearray(pathlib.Path(path).read_bytes())).call)
"""


def write(graph: Graph, path: pathlib.Path) -> None:
    """Writes the file."""

    def compute(image):
        return graph.compute(graph.resize(image))

    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(compute), platforms=platforms)(graph.spec(graph.given))
    path.write_bytes(exported.serialize())
