r"""Turns a trained network into a file for other runtimes, and checks that it computes the same.

    prn-jax export --checkpoint=runs/mvtec/bottle --format=onnx --output=bottle.onnx \
        --input_size=2048,2448

Input `image`, uint8 [b, h, w, 3]; outputs `map`, float32 [b, h, w], `score` and `distance`,
float32 [b].
"""

import os
import pathlib

from absl import flags

from prn_jax import program

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "<workdir>/<category> of a training.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
FORMAT = flags.DEFINE_enum(
    "format", "stablehlo", ["stablehlo", "savedmodel", "onnx", "openvino"], "Of what."
)
OUTPUT = flags.DEFINE_string("output", None, "The file; of SavedModel and OpenVINO, the folder.")
INPUT_SIZE = flags.DEFINE_list(
    "input_size", [], "Height,width of the images it takes; default: the network's own."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Images that it takes; 0: any number.", 0)
OPSET = flags.DEFINE_integer(
    "opset", None, "Of onnx and openvino; default: what jax2onnx writes.", lower_bound=1
)
INT8 = flags.DEFINE_bool("int8", False, "8-bit convolutions, of onnx.")
IMAGES = flags.DEFINE_string(
    "images", "", "Folder of images to compare on; default: the test images of the training."
)
MANUAL_DIR = flags.DEFINE_string(
    "manual_dir", "", "Raw files to calibrate --int8 by; default: where the training had them."
)
flags.mark_flags_as_required(["checkpoint", "output"])


def main() -> None:
    """Exports and compares."""
    import jax

    # In float32 as it is written: accelerators compute in bfloat16, or round what they multiply.
    jax.config.update("jax_platforms", "cpu")
    from prn_jax import export, predict
    from prn_jax.errors import shown
    from prn_jax.export import calibration, check

    kind, int8 = FORMAT.value, INT8.value
    export.prepare(kind, OUTPUT.value, int8, OPSET.value)
    detector = predict.load(CHECKPOINT.value, STEP.value)
    size = _size(INPUT_SIZE.value) or detector.image_size
    split = None
    if not IMAGES.value or not export.is_exact(kind, int8):
        split = check.read_run(CHECKPOINT.value)
    if IMAGES.value:
        folder = pathlib.Path(os.path.expanduser(IMAGES.value))
        files = check.read_folder(folder, size, detector.white_level)
    else:
        files = check.enlarged(split, size)
    checked = export.export(
        detector, kind, OUTPUT.value, files, input_size=size, batch_size=BATCH_SIZE.value,
        opset=OPSET.value, split=split,
        calibration=calibration.sample(detector, MANUAL_DIR.value) if int8 else None,
    )  # fmt: skip
    print(f"{shown(OUTPUT.value)}: {_described(checked)}", flush=True)


def _size(texts: list[str]) -> tuple[int, int] | None:
    from prn_jax.errors import UserError

    if not texts:
        return None
    if len(texts) != 2 or not all(x.isdecimal() and int(x) for x in texts):
        raise UserError(f"--input_size={','.join(texts)}: give height,width in pixels")
    return int(texts[0]), int(texts[1])


def _described(checked) -> str:
    from prn_jax.export import check

    verdicts = {None: "", 0: ", no verdict differs"}.get(
        checked.verdicts, f", {checked.verdicts} verdicts differ"
    )
    if checked.figures:
        what = f"accepted: {check.describe(checked.figures)}; compared with the checkpoint"
    else:
        what = "equals the checkpoint"
    return (
        f"{what} on {checked.images} images (maps within {checked.map_difference:.1e}, scores "
        f"within {checked.score_difference:.1e}, distances within {checked.distance_difference:.1e}"
        f"{verdicts}); {checked.images_per_s:.1f} images/s, "
        f"the checkpoint {checked.checkpoint_images_per_s:.1f}"
    )


def run() -> None:
    """Parses the command line and runs."""
    program.run(main)
