"""Measures trained networks in every runtime that they are exported to, in one run.

    python launch/export_speed.py --checkpoint=runs/mvtec/bottle,runs/fast/bottle --batch_sizes=1,16

Needs the extra "export"; each runtime computes in a fresh process, with its own default threads.
"""

import pathlib
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax import program  # noqa: E402

CHECKPOINT = flags.DEFINE_list("checkpoint", None, "<workdir>/<category> of trainings.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "16"], "Images at a time.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each is measured.", 1)
MANUAL_DIR = flags.DEFINE_string(
    "manual_dir", "", "Raw files to calibrate 8 bits by; default: where the trainings had them."
)
flags.mark_flag_as_required("checkpoint")


def main() -> None:
    """Prints what each network is, and a row for each of them, runtime and batch size."""
    from prn_jax import benchmark, predict, results
    from prn_jax.errors import UserError
    from prn_jax.export import calibration, check, speed

    sizes = [int(x) for x in BATCH_SIZES.value if x.isdecimal() and int(x)]
    if len(sizes) != len(BATCH_SIZES.value) or not sizes:
        raise UserError(f"--batch_sizes={','.join(BATCH_SIZES.value)}: give numbers above 0")
    print(", ".join(f"{k} {v}" for k, v in benchmark.describe_device().items()), flush=True)
    networks = []
    for number, path in enumerate(CHECKPOINT.value, 1):
        detector = predict.load(path)
        networks.append((detector, calibration.sample(detector, MANUAL_DIR.value)))
        height, width = detector.image_size
        print(f"{number}: {path}: {detector.config.backbone.name}, {height}x{width}")
        folder = check.run_folder(path)
        if (folder / "results.json").exists():  # else a copy of the checkpoints alone
            figures = results.read_run(folder)["metrics"].items()
            shown = (f"{results.COLUMNS[name]} {results.percent(x)}" for name, x in figures)
            print(f"   {', '.join(shown)}")
    print("images/s: median (least to greatest); the process' memory at its peak; size on disk")
    for row in speed.measure(networks, sizes, ROUNDS.value):
        least, most = min(row.images_per_s), max(row.images_per_s)
        print(
            f"  {row.network + 1}  {row.runtime:24} batch {row.batch:3} {row.median:8.1f} "
            f"({least:.1f} to {most:.1f}) {row.memory_mb:7.0f} MB {row.disk_mb:7.1f} MB",
            flush=True,
        )


if __name__ == "__main__":
    program.run(main)
