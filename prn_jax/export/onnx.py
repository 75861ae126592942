"""ONNX, by jax2onnx; with 8-bit convolutions where there are images to calibrate by."""

import contextlib
import json
import logging
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from prn_jax.errors import UserError, first_line
from prn_jax.export.graph import OUTPUTS, Graph

NEEDS = ("jax2onnx", "onnxruntime")
IS_EXACT = True  # without calibration
UNFUSED = True  # see `models.prn.PRN`
RUNNER = """
import onnxruntime
onnxruntime.set_default_logger_severity(3)
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
def run(image):
    return session.run(["map", "score", "distance"], {"image": image})
"""


def write(graph: Graph, path: pathlib.Path, alone: pathlib.Path | None = None) -> None:
    """Writes the file; its `metadata_props` describe the network.

    Args:
      graph: what to write.
      path: of the file.
      alone: where the network without the resize goes, to be judged by itself.

    Raises:
      UserError: `graph.opset` is none that jax2onnx can write.
    """
    import onnx

    model = _convert(graph, graph.compute, graph.size, OUTPUTS)
    if graph.calibration is not None:
        model = _quantised(model, graph.calibration, graph.batch or 1)
    if alone:
        onnx.save(model, str(alone))
    if graph.given != graph.size:
        model = _after(_convert(graph, graph.resize, graph.given, ["resized"]), model)
    onnx.helper.set_model_props(
        model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in graph.about.items()}
    )
    onnx.save(model, str(path))


def _convert(graph: Graph, function, size, outputs):
    with _quiet():
        import jax2onnx

        try:
            model = jax2onnx.to_onnx(
                function,
                [graph.spec(size)],
                model_name="prn",
                input_names=["image"],
                output_names=list(outputs),
                **({} if graph.opset is None else {"opset": graph.opset}),
            )
        except (NotImplementedError, ValueError) as error:
            if graph.opset is None:
                raise
            raise UserError(
                f"--opset={graph.opset}: jax2onnx cannot write it: {first_line(error)}"
            ) from error
    # Shapes between nodes are those before jax2onnx moved the channels: runtimes find their own.
    del model.graph.value_info[:]
    if graph.opset is not None:
        _require_valid(model, graph.opset)
    return model


def _require_valid(model, opset: int) -> None:
    """Refuses what jax2onnx has written of operators that the opset does not have so."""
    import onnxruntime

    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a type for each reason
        raise UserError(
            f"--opset={opset}: onnxruntime does not take it: {first_line(error)}; give a higher one"
        ) from error


def _after(first, second):
    """One model of two: the output of `first` becomes the input of `second`."""
    import onnx

    # Names in `second` stay, its outputs' above all; those of `first` get out of their way.
    first = onnx.compose.add_prefix(first, "resize_")
    first.ir_version = second.ir_version
    merged = onnx.compose.merge_models(
        first, second, io_map=[(first.graph.output[0].name, second.graph.input[0].name)]
    )
    image = merged.graph.input[0]
    for node in merged.graph.node:
        for i, name in enumerate(node.input):
            if name == image.name:
                node.input[i] = "image"
    image.name = "image"
    return merged


def _quantised(model, images: np.ndarray, batch: int):
    """8-bit convolutions, in QDQ form, per channel; everything else stays float32.

    So do the frozen stages: a residual is a small difference of features, and 8 bits of them cost
    pill 7 points of pixel AP (docs/benchmarks.md). They are what the distance is computed from, and
    what chooses the nearest prototype of each look.
    Weights have 7 bits: on a CPU without VNNI's instructions the sums of 8 bits would saturate, and
    what was accepted here would not hold there.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            count = -(-len(images) // batch)  # the last one is filled up by the first images
            self._left = iter(np.resize(images, (count, batch, *images.shape[1:])))

        def get_next(self):
            image = next(self._left, None)
            return None if image is None else {"image": image}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        given, prepared, made = (str(pathlib.Path(folder) / x) for x in ("given", "ready", "made"))
        onnx.save(model, given)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        ready = onnx.load(prepared)
        choices = (x.output[0] for x in ready.graph.node if x.op_type == "ArgMin")
        frozen = _leading_to(["distance", *choices], ready)
        quantization.quantize_static(
            prepared,
            made,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            nodes_to_exclude=frozen,
        )
        return _rounded_for_convs_alone(onnx.load(made), frozen)


def _leading_to(values: list[str], model) -> list[str]:
    """Names of the nodes that some values are computed from."""
    makers = {name: node for node in model.graph.node for name in node.output}
    found, left = set(), list(values)
    while left:
        node = makers.get(left.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            left += node.input
    return sorted(found)


def _rounded_for_convs_alone(model, frozen: list[str]):
    """Gives back what is not rounded to all but the 8-bit convolutions that take it.

    onnxruntime lets whatever takes the input of one have it rounded. What one puts out is rounded
    for all: its own kernel does that.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    convs = {x.name for x in model.graph.node if x.op_type == "Conv"} - set(frozen)
    for node in model.graph.node:
        if node.name in convs:
            continue
        for i, name in enumerate(node.input):
            restoring = makers.get(name)
            if restoring is None or restoring.op_type != "DequantizeLinear":
                continue
            rounding = makers.get(restoring.input[0])  # a weight has none
            source = makers.get(rounding.input[0]) if rounding is not None else None
            if source is not None and source.name not in convs:
                node.input[i] = rounding.input[0]
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the converters log: their progress, and 220 values that have no type."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
