"""TensorFlow's SavedModel: the program as XLA's, the score in TensorFlow's ops."""

import json
import pathlib
import tempfile

import jax

from prn_jax import evaluate
from prn_jax.export.graph import Graph
from prn_jax.models.whole import raised

NEEDS = ("tensorflow",)
IS_EXACT = True
UNFUSED = False  # XLA fuses
RUNNER = """
import tensorflow as tf
model = tf.saved_model.load(path)
serve = model.signatures["serving_default"]
def run(image):
    found = serve(image=tf.constant(image))
    return found["map"], found["score"], found["distance"]
"""
# TensorFlow's copy of StableHLO is older than JAX's: what twelve weeks ago was current.
_TENSORFLOW_AGE = "WEEK_12"


def write(graph: Graph, path: pathlib.Path) -> None:
    """Writes the folder; `assets/prn_jax.json` in it describes the network."""
    import tensorflow as tf
    from jaxlib.mlir.dialects import stablehlo
    from tensorflow.compiler.tf2xla.python import xla

    def inspect(image):
        return graph.inspect(graph.resize(image))

    spec = graph.spec(graph.given)
    exported = jax.export.export(jax.jit(inspect), platforms=("cpu", "cuda"))(spec)
    # jax2tf would write the current StableHLO, which TensorFlow cannot read yet.
    age = getattr(stablehlo.StablehloCompatibilityRequirement, _TENSORFLOW_AGE)
    version = stablehlo.get_version_from_compatibility_requirement(age)
    program = stablehlo.serialize_portable_artifact_str(exported.mlir_module(), version)
    height, width = graph.size
    count = graph.batch or None
    top = evaluate.score_count(graph.score_pixels, height, width)
    signature = [tf.TensorSpec([count, *graph.given, 3], tf.uint8, name="image")]

    class Module(tf.Module):
        @tf.function(input_signature=signature, autograph=False)
        def __call__(self, image):
            maps, distances = xla.call_module(
                [image],
                version=exported.calling_convention_version,
                module=program,
                Sout=[tf.TensorShape([count, height, width]), tf.TensorShape([count])],
                Tout=[tf.float32, tf.float32],
                platforms=["CPU", "CUDA"],
            )
            # In TensorFlow's ops: its XLA knows no top k of a batch of any size.
            best = tf.math.top_k(tf.reshape(maps, [-1, height * width]), top).values
            scores = raised(tf.reduce_mean(best, axis=1), distances, graph.exponent)
            return {"map": maps, "score": scores, "distance": distances}

    module = Module()
    with tempfile.TemporaryDirectory() as folder:
        described = pathlib.Path(folder) / "prn_jax.json"
        described.write_text(json.dumps(graph.about, indent=2) + "\n")
        module.description = tf.saved_model.Asset(str(described))
        tf.saved_model.save(module, str(path), signatures={"serving_default": module.__call__})
