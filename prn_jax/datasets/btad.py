"""BeanTech AD: three industrial products (Mishra et al., ISIE 2021)."""

import pathlib

import tensorflow_datasets as tfds

from prn_jax.datasets import base, layout

_COUNTS = {
    "01": (400, 0, 21, 49),
    "02": (399, 0, 30, 200),
    "03": (1000, 0, 400, 41),
}


class Btad(base.AnomalyBuilder, skip_registration=True):
    """`<category>/train/ok`, `test/{ok,ko}`, `ground_truth/ko`; masks have their image's name.

    Images and masks are .bmp or .png, independently of one another. The only defect is "ko".
    """

    name = "btad"
    title = "BeanTech AD"
    licence = "CC BY-NC-SA 4.0"
    page = "https://avires.dimi.uniud.it/papers/btad/btad.zip"
    counts = _COUNTS
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=category) for category in _COUNTS]

    @classmethod
    def _scan(cls, folder: pathlib.Path, stray: list[pathlib.Path]) -> list[layout.Example]:
        return layout.scan_folders(folder, stray, normal="ok", suffixes=("",))
