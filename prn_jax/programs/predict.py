"""Says of new images whether they are anomalous, and where.

    prn-jax predict --checkpoint=runs/mvtec/bottle --output=predictions IMAGES...

IMAGES are files, folders (searched recursively) or patterns in quotes. `--output` receives
predictions.csv and predictions.json, and per image a heat map and an overlay at its own size. Rows
are written as they come; the same command goes on with what is missing. A file that cannot be read
is reported, skipped, and makes the exit status 1.
"""

import sys
import time

from absl import flags

from prn_jax import program

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "<workdir>/<category> of a training.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
OUTPUT = flags.DEFINE_string("output", "predictions", "Folder of what is written.")
THRESHOLD = flags.DEFINE_float(
    "threshold", None, "Score from which an image is anomalous; default: the checkpoint's."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images at a time.", lower_bound=1)
SHARD = flags.DEFINE_string(
    "shard", "", "2/8: the second of eight parts, as of a job array; the last to end joins them."
)
PICTURES = flags.DEFINE_bool("pictures", True, "Write heat maps and overlays.")
flags.mark_flags_as_required(["checkpoint"])


def main(patterns: list[str]) -> None:
    """Predicts, and says what was found."""
    from absl import logging

    from prn_jax import mesh, predict, predictions, shards, thresholds

    names = predictions.find(patterns)
    folder = OUTPUT.value
    if SHARD.value:
        number, count = shards.parse(SHARD.value)
        names, folder = shards.select(names, number, count), shards.folder(folder, number, count)
        shards.begin(folder)
    output = predictions.prepare(folder)
    mesh.cache_compilations()
    detector = predict.load(CHECKPOINT.value, STEP.value)
    threshold = THRESHOLD.value
    if threshold is None and detector.thresholds:
        threshold = detector.thresholds["image"]
        logging.info("threshold %.4f: %s", threshold, thresholds.describe(detector.thresholds))
    elif threshold is None:
        logging.warning("the checkpoint has no threshold: no verdicts; give --threshold")
    began = time.monotonic()
    rows = predictions.predict_files(
        detector,
        names,
        output,
        threshold=threshold,
        batch_size=BATCH_SIZE.value,
        with_pictures=PICTURES.value,
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
