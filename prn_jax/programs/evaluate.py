"""Judges a trained network on other images: another day's, another split.

    prn-jax evaluate --checkpoint=runs/bolts/bolt --images=/data/tuesday/bolt --output=tuesday

Prints metrics, and what the stored thresholds do beside thresholds chosen on these images. Writes
evaluation.json, evaluation.md and evaluation.png. Images that were trained on are left out.
"""

import os
import pathlib
import sys

from absl import flags

from prn_jax import program

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "<workdir>/<category> of a training.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
IMAGES = flags.DEFINE_string(
    "images", None, "A product's folder: test/good, test/<defect>, ground_truth/<defect>."
)
SPLIT = flags.DEFINE_enum(
    "split", "test", ["test", "train"], "Without --images: of the training's own data set."
)
MANUAL_DIR = flags.DEFINE_string(
    "manual_dir", None, "Where that data set is; default: where it was."
)
OUTPUT = flags.DEFINE_string("output", None, "Folder of what is written.")
flags.mark_flags_as_required(["checkpoint", "output"])


def main() -> None:
    """Judges, and says how."""
    from prn_jax import judge, mesh, predict
    from prn_jax.errors import UserError

    if IMAGES.value is not None and (MANUAL_DIR.present or SPLIT.present):
        raise UserError("--images is one folder, --split and --manual_dir name another: give one")
    judge.prepare(OUTPUT.value)
    mesh.cache_compilations()
    detector = predict.load(CHECKPOINT.value, STEP.value)
    if IMAGES.value is None:
        found = judge.read_own(detector, SPLIT.value, MANUAL_DIR.value)
    else:
        found = judge.read_folder(pathlib.Path(os.path.expanduser(IMAGES.value)), detector)
    found = judge.leave_out_trained(found, detector)
    evaluation, sheet = judge.judge(detector, found, progress=sys.stderr.isatty())
    given = {x.name: x.value for x in (CHECKPOINT, IMAGES, SPLIT, MANUAL_DIR)}
    evaluation["source"] = given if IMAGES.value is None else given | {"split": None}
    path = judge.write(OUTPUT.value, evaluation, sheet)
    print(path.read_text(), end="", flush=True)


def run() -> None:
    """Parses the command line and runs."""
    program.run(main)
