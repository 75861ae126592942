"""DAGM 2007: ten synthetic textures whose defects are marked by coarse ellipses."""

import pathlib

import tensorflow_datasets as tfds

from prn_jax.datasets import base, layout

# Defective images of classes 1 to 10, in the training and the test part.
_DEFECTIVE = {
    "Train": (79, 66, 66, 82, 70, 83, 150, 150, 150, 150),
    "Test": (71, 84, 84, 68, 80, 67, 150, 150, 150, 150),
}


def _counts() -> dict[str, tuple[int, int, int, int]]:
    counts = {}
    for i, (train, test) in enumerate(zip(*_DEFECTIVE.values(), strict=True), start=1):
        half = 575 if i <= 6 else 1150
        counts[f"Class{i}"] = (half - train, train, half - test, test)
    return counts


class Dagm2007(base.AnomalyBuilder, skip_registration=True):
    """`ClassN/{Train,Test}/NNNN.PNG` and, of the defective ones, `Label/NNNN_label.PNG` in there.

    The seen anomalies come from the training part, whose defective images are in split `train`.
    """

    name = "dagm2007"
    title = "DAGM 2007"
    licence = "terms on the page"
    page = "https://www.kaggle.com/datasets/mhskjelvareid/dagm-2007-competition-dataset-optical-inspection"
    counts = _counts()
    seen_from = "train"
    marker = "Train"
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=category) for category in _counts()]

    @classmethod
    def _scan(cls, folder: pathlib.Path, stray: list[pathlib.Path]) -> list[layout.Example]:
        examples = []
        for part in ("Train", "Test"):
            there = layout.out_of_place(folder / part, ())
            name = next((x.name for x in there if x.name.lower() == "label"), "Label")
            found = layout.list_images(folder / part, stray, folders=(name,))
            layout.check_normal(found)
            labels = layout.list_images(folder / part / name, stray)
            stray[:] = [x for x in stray if x.name.lower() != "labels.txt"]  # of the archive
            masks = layout.pair_masks(found, labels, ("_label",))
            for stem, path in found.items():
                defect = "defect" if stem in masks else layout.GOOD
                examples.append(
                    layout.Example(f"{part}/{stem}", part.lower(), defect, path, masks.get(stem))
                )
        return examples
