"""OpenVINO's intermediate representation, float16 weights, made from the ONNX model.

Compile it with `{"INFERENCE_PRECISION_HINT": "f32"}`: on CPUs that have bfloat16, OpenVINO computes
in it otherwise, too coarsely for the levels of a resize and for the figures that were judged.
"""

import json
import logging
import pathlib
import sys
import tempfile

from prn_jax.export import onnx
from prn_jax.export.graph import Graph

NEEDS = ("jax2onnx", "onnxruntime", "openvino")
IS_EXACT = False
UNFUSED = True  # see `models.prn.PRN`
RUNNER = """
sys.modules.setdefault("openvino_telemetry", None)
import openvino
compiled = openvino.Core().compile_model(
    path + "/model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
)
def run(image):
    found = compiled(image)
    return found["map"], found["score"], found["distance"]
"""


def write(graph: Graph, path: pathlib.Path, alone: pathlib.Path | None = None) -> None:
    """Writes the folder: `model.xml`, whose `rt_info` describes the network, and `model.bin`.

    Args:
      graph: what to write.
      path: of the folder.
      alone: where the network without the resize goes, to be judged by itself.

    Raises:
      UserError: see `onnx.write`.
    """
    # Its Python package reports to a server that it is used, as soon as it is imported.
    sys.modules.setdefault("openvino_telemetry", None)
    handlers = list(logging.root.handlers)
    import openvino

    # It takes absl's handler away: everybody's progress would be printed from then on.
    logging.root.handlers[:] = handlers
    with tempfile.TemporaryDirectory() as folder:
        file, file_alone = (pathlib.Path(folder) / x for x in ("model.onnx", "alone.onnx"))
        onnx.write(graph, file, file_alone)
        for source, target in ((file, path), (file_alone, alone)):
            if target is None:
                continue
            model = openvino.Core().read_model(str(source))
            for name, value in graph.about.items():
                text = value if isinstance(value, str) else json.dumps(value)
                model.set_rt_info(text, ["prn_jax", name])
            target.mkdir()
            openvino.save_model(model, str(target / "model.xml"), compress_to_fp16=True)
