"""Prints the tables of docs/scaling.md: how one run, and how a study, scales from 1 to 256 chips.

    python launch/scaling.py --share_of_peak=0.3

What is measured comes in by flags (launch/benchmark.py gives it); what is published stands in
`CHIPS`; what is assumed is named in the printed text.
"""

import dataclasses
import math
import pathlib
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax import program  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip.

    Attributes:
      tflops: dense bfloat16 matrix products, 1e12 operations per second.
      link_gb: to the other chips of its island, 1e9 bytes per second in one direction.
      island: chips that such links join.
      network_gb: beyond the island, the same unit.
      cores: of the host, per chip.
    """

    tflops: float
    link_gb: float
    island: int
    network_gb: float
    cores: int


# Google's pages of TPU v5e and v6e (1600 and 3584 Gbit/s of links per chip, both directions
# together), NVIDIA's data sheets of the H100 and H200 (NVLink 900 GB/s both ways; 400 Gbit/s
# of network per GPU in a DGX). Cores are those of the usual hosts.
CHIPS = {
    "v5e": Chip(197, 100, 256, 100, 28),
    "v6e": Chip(918, 224, 256, 224, 22),
    "H100/H200": Chip(989, 450, 8, 50, 14),
}
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

GFLOP = flags.DEFINE_float("gflop_per_image", 67.6, "One training step, per image (measured).")
PARAMETERS = flags.DEFINE_float("parameters", 27.2e6, "Trained, float32 gradients (measured).")
SHARE = flags.DEFINE_float("share_of_peak", 0.2, "Of the chip that the step reaches (assumed).")
INPUT = flags.DEFINE_float("input_per_core", 280.0, "Images/s of one core (measured).")
COLLECTIVES = flags.DEFINE_integer(
    "collectives", 51, "Small reductions before the gradient's: three of each batch norm (counted)."
)
LATENCY = flags.DEFINE_float("latency_us", 10.0, "Of one small reduction (assumed).")
OVERHEAD = flags.DEFINE_float("overhead_ms", 2.0, "Of a step, whatever its batch (assumed).")
BATCH = flags.DEFINE_integer("batch_size", 64, "Images per step over all chips.")
STEPS = flags.DEFINE_integer("steps", 4571, "Of one category (700 epochs of 209 images).")
RUNS = flags.DEFINE_integer("runs", 45, "Of a study: categories x seeds.")


def main() -> None:
    """Prints one table per chip, and one of the study."""
    print(
        f"Measured: {GFLOP.value:g} GFLOP per image and training step, "
        f"{PARAMETERS.value * 4 / 1e6:.0f} MB of gradients, input {INPUT.value:g} images/s per "
        f"core. Assumed: {SHARE.value:.0%} of the peak, {OVERHEAD.value:g} ms per step, "
        f"{COLLECTIVES.value} small reductions of {LATENCY.value:g} us. "
        f"Batch {BATCH.value}, {STEPS.value} steps.\n"
    )
    print("| chips | images per chip | " + " | ".join(CHIPS) + " |")
    print("| ---: | ---: |" + " ---: |" * len(CHIPS))
    for count in COUNTS:
        if count > BATCH.value:
            break
        cells = [_cell(chip, count) for chip in CHIPS.values()]
        print(f"| {count} | {BATCH.value // count} | " + " | ".join(cells) + " |")
    print(
        f"\nImages/s, share of linear scaling, what limits.\n\n"
        f"A study of {RUNS.value} runs, hours: each run on all chips, one after another, against "
        "one run per chip.\n"
    )
    heads = [f"{name}, {way}" for name in CHIPS for way in ("all chips", "one each")]
    print("| chips | " + " | ".join(heads) + " |")
    print("| ---: |" + " ---: |" * len(heads))
    for count in COUNTS:
        cells = []
        for chip in CHIPS.values():
            together = RUNS.value * STEPS.value * step_seconds(chip, min(count, BATCH.value))[0]
            rounds = math.ceil(RUNS.value / count)
            apart = rounds * STEPS.value * step_seconds(chip, 1)[0]
            cells += [f"{together / 3600:.2f}", f"{apart / 3600:.2f}"]
        print(f"| {count} | " + " | ".join(cells) + " |")


def step_seconds(chip: Chip, count: int) -> tuple[float, str]:
    """Seconds of a step on `count` chips, and what limits it: compute, reduction or input."""
    compute = BATCH.value / count * GFLOP.value * 1e9 / (SHARE.value * chip.tflops * 1e12)
    compute += OVERHEAD.value * 1e-3
    reduction = 0.0
    if count > 1:
        gigabytes = PARAMETERS.value * 4e-9
        # A ring sends each byte twice, less what is a chip's own; between islands likewise.
        inside = min(count, chip.island)
        reduction = 2 * (inside - 1) / inside * gigabytes / chip.link_gb
        islands = count // inside
        if islands > 1:
            share = gigabytes / inside  # each chip of an island carries its part outside
            reduction += 2 * (islands - 1) / islands * share / chip.network_gb
        reduction += COLLECTIVES.value * LATENCY.value * 1e-6
    device = compute + reduction  # without any overlap: the gradient comes last
    images = BATCH.value / (INPUT.value * chip.cores * count)
    if images > device:
        return images, "input"
    return device, "compute" if compute > reduction else "reduction"


def _cell(chip: Chip, count: int) -> str:
    seconds, limit = step_seconds(chip, count)
    alone, _ = step_seconds(chip, 1)
    return f"{BATCH.value / seconds:.0f}, {alone / (count * seconds):.0%}, {limit}"


if __name__ == "__main__":
    program.run(main)
