"""Says of new images whether they are anomalous, and where.

    prn-jax predict --checkpoint=runs/mvtec/bottle --output=predictions IMAGES...

IMAGES are files, folders (searched recursively) or patterns in quotes. `--output` receives
predictions.csv and predictions.json, and per image a heat map, an overlay and a mask at its own
size. Rows are written as they come; the same command goes on with what is missing. A file that
cannot be read is reported, skipped, and makes the exit status 1.
"""

import os
import pathlib
import sys
import time

from absl import flags

from prn_jax import program
from prn_jax.programs import verdicts

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "<workdir>/<category> of a training.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
OUTPUT = flags.DEFINE_string("output", "predictions", "Folder of what is written.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images at a time.", lower_bound=1)
SHARD = flags.DEFINE_string(
    "shard", "", "2/8: the second of eight parts, as of a job array; the last to end joins them."
)
PICTURES = flags.DEFINE_bool("pictures", True, "Write heat maps, overlays and masks.")
MAPS = flags.DEFINE_enum(
    "maps", "", ["", "tiff", "npy"], "Write the maps themselves, float32, at the image's own size."
)
EXPLAIN = flags.DEFINE_bool(
    "explain", False, "Beside each alarm show the normal training image that is most like it."
)
flags.adopt_module_key_flags(verdicts)
flags.mark_flags_as_required(["checkpoint"])


def main(patterns: list[str]) -> None:
    """Predicts, and says what was found."""
    from prn_jax import explain, mesh, predict, predictions, shards, tables
    from prn_jax.identity import lock

    names = predictions.find(patterns)
    folder = OUTPUT.value
    if SHARD.value:
        number, count = shards.parse(SHARD.value)
        tables.check_free(pathlib.Path(os.path.expanduser(folder)))
        names, folder = shards.select(names, number, count), shards.folder(folder, number, count)
    output = predictions.prepare(folder)
    mesh.cache_compilations()
    detector = predict.load(CHECKPOINT.value, STEP.value, verdicts.WHITE_LEVEL.value)
    normals = explain.read(CHECKPOINT.value) if EXPLAIN.value else None
    asked = verdicts.asked(
        detector, pictures=PICTURES.value, maps=MAPS.value, explain=EXPLAIN.value
    )
    began = time.monotonic()
    with lock(output, "prediction", flag="--output"):
        rows = predictions.predict_files(
            detector, names, output, asked, normals=normals, batch_size=BATCH_SIZE.value
        )
    print(predictions.summary(rows, time.monotonic() - began, output), flush=True)
    if SHARD.value:
        print(shards.join(OUTPUT.value, count), flush=True)
    if any(row["error"] for row in rows):
        sys.exit(1)


def run() -> None:
    """Parses the command line and runs."""
    program.run(
        main, positional=True, afterwards="the same command goes on with the images that are left"
    )
