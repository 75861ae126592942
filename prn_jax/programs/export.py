"""Turns a trained network into a file for other runtimes, and checks that it computes the same.

    prn-jax export --checkpoint=runs/mvtec/bottle --format=onnx --output=bottle.onnx

Input `image`, uint8 [b, h, w, 3]; outputs `map`, float32 [b, h, w], and `score`, float32 [b].
"""

import pathlib

from absl import flags

from prn_jax import program

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "<workdir>/<category> of a training.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
FORMAT = flags.DEFINE_enum("format", "stablehlo", ["stablehlo", "savedmodel", "onnx"], "Of what.")
OUTPUT = flags.DEFINE_string("output", None, "The file; of a SavedModel, the folder.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Images that it takes; 0: any number.", 0)
IMAGES = flags.DEFINE_string(
    "images", "", "Folder of images to compare on; default: the test images of the training."
)
flags.mark_flags_as_required(["checkpoint", "output"])


def main() -> None:
    """Exports and compares."""
    from prn_jax import export, predict
    from prn_jax.errors import shown

    export.prepare(FORMAT.value, OUTPUT.value)
    detector = predict.load(CHECKPOINT.value, STEP.value)
    images = _images(detector)
    checked = export.export(detector, FORMAT.value, OUTPUT.value, images, BATCH_SIZE.value)
    print(
        f"{shown(OUTPUT.value)}: equals the checkpoint on {checked.images} images (maps within "
        f"{checked.map_difference:.1e}, scores within {checked.score_difference:.1e}); "
        f"{checked.images_per_s:.1f} images/s, "
        f"the checkpoint {checked.checkpoint_images_per_s:.1f}",
        flush=True,
    )


def _images(detector):
    import numpy as np
    from absl import logging

    from prn_jax import images, results
    from prn_jax.errors import UserError, shown

    if IMAGES.value:
        folder = pathlib.Path(IMAGES.value).expanduser()
        paths, skipped = images.find_images(folder)
        if skipped:
            logging.warning("--images: not used: %s", images.describe(skipped))
        if not paths:
            raise UserError(f"--images={shown(IMAGES.value)}: no such folder, or no images in it")
        white = getattr(detector, "white_level", 0)
        arrays = (images.read_array(x, white) for x in paths)
        return np.stack([images.resize(x, detector.image_size) for x in arrays])
    folder = pathlib.Path(CHECKPOINT.value).expanduser().resolve()
    folder = folder.parent if folder.name == "checkpoints" else folder
    if not (folder / "predictions.npz").exists():
        raise UserError(f"no test images in {shown(folder)}: give a folder of images as --images")
    return results.read_predictions(folder)["image"]


def run() -> None:
    """Parses the command line and runs."""
    program.run(main)
