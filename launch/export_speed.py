"""Measures a trained network in every runtime that it is exported to, in one run.

    python launch/export_speed.py --checkpoint=runs/mvtec/bottle --batch_sizes=1,16

Needs the extra "export"; each runtime computes in a fresh process, with its own default threads.
"""

import pathlib
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax import program  # noqa: E402

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "<workdir>/<category> of a training.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "16"], "Images at a time.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each is measured.", 1)
MANUAL_DIR = flags.DEFINE_string(
    "manual_dir", "", "Raw files to calibrate 8 bits by; default: where the training had them."
)
flags.mark_flag_as_required("checkpoint")


def main() -> None:
    """Prints a row for each runtime and batch size."""
    from prn_jax import benchmark, predict
    from prn_jax.errors import UserError
    from prn_jax.export import calibration, speed

    sizes = [int(x) for x in BATCH_SIZES.value if x.isdigit() and int(x)]
    if len(sizes) != len(BATCH_SIZES.value) or not sizes:
        raise UserError(f"--batch_sizes={','.join(BATCH_SIZES.value)}: give numbers above 0")
    detector = predict.load(CHECKPOINT.value)
    height, width = detector.image_size
    print(", ".join(f"{k} {v}" for k, v in benchmark.describe_device().items()), flush=True)
    print(f"{detector.config.backbone.name}, {height}x{width}; images/s: median, least, greatest")
    images = calibration.sample(detector, MANUAL_DIR.value)
    for name, batch, *figures in speed.measure(detector, images, sizes, ROUNDS.value):
        shown = "".join(f"{x:9.1f}" for x in figures)
        print(f"  {name:24} batch {batch:3}{shown}", flush=True)


if __name__ == "__main__":
    program.run(main)
