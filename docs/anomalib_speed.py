r"""How fast anomalib's PatchCore and EfficientAD judge images on this machine.

    python -m venv peers && peers/bin/pip install torch==2.14.1 torchvision==0.29.1 anomalib==2.7.0
    peers/bin/python docs/anomalib_speed.py --image_size=256

To put beside launch/export_speed.py's rows; needs nothing of this package. The networks have
random weights, which take the same time: PatchCore with ResNet-18's stages 2 and 3 and as large a
memory as 10 % of the patches of `--images` normal images, and, from 256 pixels on, which it needs,
EfficientAD's small network. Figures are in docs/benchmarks.md.
"""

import argparse
import importlib.metadata
import resource
import statistics
import subprocess
import sys
import time

NAMES = ("patchcore", "efficientad")


def main() -> None:
    """Prints a row for each network and batch size, each network in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_size", type=int, default=256, help="Pixels of a side.")
    parser.add_argument("--images", type=int, default=209, help="Normal images (bottle has 209).")
    parser.add_argument("--rounds", type=int, default=3, help="How often each is measured.")
    parser.add_argument("--seconds", type=float, default=10, help="How long a round lasts.")
    parser.add_argument("--network", choices=NAMES, help="Only this, in this process.")
    options = parser.parse_args()
    if options.network is None:
        versions = (f"{x} {importlib.metadata.version(x)}" for x in ("anomalib", "torch"))
        print(", ".join(versions), flush=True)
        quietly = [sys.executable, "-W", "ignore", *sys.argv]
        for name in NAMES[: 2 if options.image_size >= 256 else 1]:
            subprocess.run([*quietly, f"--network={name}"], check=True)
        return
    import torch

    model, note = _build(options)
    for batch in (1, 16):
        images = torch.rand(batch, 3, options.image_size, options.image_size)
        rates = [_images_per_s(model, images, options.seconds) for _ in range(options.rounds)]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{note}  batch {batch:2}  {statistics.median(rates):6.1f} images/s "
            f"({min(rates):.1f} to {max(rates):.1f})  {memory:.0f} MB",
            flush=True,
        )


def _build(options: argparse.Namespace):
    """The network, ready to judge, and what it is."""
    if options.network == "efficientad":
        from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel

        return EfficientAdModel().eval(), "EfficientAD, small"
    import torch
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(["layer2", "layer3"], "resnet18", pre_trained=False).eval()
    # Stage 2 has a place for each 8x8 pixels, and 128 channels; stage 3 has 256.
    patches = options.images * (options.image_size // 8) ** 2 // 10
    model.memory_bank = torch.rand(patches, 128 + 256)
    return model, f"PatchCore, ResNet-18, {patches:,} patches"


def _images_per_s(model, images, seconds: float) -> float:
    import torch

    with torch.inference_mode():
        model(images)
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            model(images)
            done += len(images)
    return done / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
