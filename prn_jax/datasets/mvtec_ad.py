"""MVTec AD: 15 categories of objects and textures (Bergmann et al., CVPR 2019)."""

import pathlib

import tensorflow_datasets as tfds

from prn_jax.datasets import base, layout

_COUNTS = {
    "bottle": (209, 0, 20, 63),
    "cable": (224, 0, 58, 92),
    "capsule": (219, 0, 23, 109),
    "carpet": (280, 0, 28, 89),
    "grid": (264, 0, 21, 57),
    "hazelnut": (391, 0, 40, 70),
    "leather": (245, 0, 32, 92),
    "metal_nut": (220, 0, 22, 93),
    "pill": (267, 0, 26, 141),
    "screw": (320, 0, 41, 119),
    "tile": (230, 0, 33, 84),
    "toothbrush": (60, 0, 12, 30),
    "transistor": (213, 0, 60, 40),
    "wood": (247, 0, 19, 60),
    "zipper": (240, 0, 32, 119),
}


class MvtecAd(base.AnomalyBuilder, skip_registration=True):
    """`<category>/train/good`, `test/{good,<defect>}`, `ground_truth/<defect>/NNN_mask.png`."""

    name = "mvtec_ad"
    title = "MVTec AD"
    licence = "CC BY-NC-SA 4.0"
    page = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
    counts = _COUNTS
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=category) for category in _COUNTS]

    @classmethod
    def _scan(cls, folder: pathlib.Path, stray: list[pathlib.Path]) -> list[layout.Example]:
        return layout.scan_folders(folder, stray, normal="good", suffixes=("_mask",))
