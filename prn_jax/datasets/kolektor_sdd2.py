"""KolektorSDD2: surfaces of one product (Bozic et al., Computers in Industry 2021)."""

import pathlib

import tensorflow_datasets as tfds

from prn_jax.datasets import base, layout
from prn_jax.errors import UserError, shown

_SUFFIX = "_GT"


class KolektorSdd2(base.AnomalyBuilder, skip_registration=True):
    """`{train,test}/NNNNN.png`, each beside its mask `NNNNN_GT.png`, empty for a normal image.

    One category, `kolektor_sdd2`. The seen anomalies come from the training part, whose defective
    images are in split `train`. Images are about 230x630 pixels.
    """

    name = "kolektor_sdd2"
    title = "KolektorSDD2"
    licence = "CC BY-NC-SA 4.0"
    page = "https://www.vicos.si/resources/kolektorsdd2/"
    counts = {"kolektor_sdd2": (2085, 246, 894, 110)}
    seen_from = "train"
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="kolektor_sdd2")]

    @classmethod
    def _category_folder(cls, root: pathlib.Path, category: str) -> pathlib.Path:
        del category  # There is one, and its folder has no name of its own.
        return root

    @classmethod
    def _scan(cls, folder: pathlib.Path, stray: list[pathlib.Path]) -> list[layout.Example]:
        examples = []
        for split in ("train", "test"):
            files = layout.list_images(folder / split, stray)
            for stem, path in files.items():
                if stem.upper().endswith(_SUFFIX) and not stem.endswith(_SUFFIX):
                    mask = path.with_stem(path.stem[: -len(_SUFFIX)] + _SUFFIX)
                    raise UserError(f"{shown(path)}: is this a mask? rename it {mask.name}")
            masks = {stem: path for stem, path in files.items() if stem.endswith(_SUFFIX)}
            found = {stem: path for stem, path in files.items() if stem not in masks}
            masks = layout.pair_masks(found, masks, (_SUFFIX,))
            for stem, path in found.items():
                if stem not in masks:
                    mask = path.with_stem(path.stem + _SUFFIX)
                    raise UserError(
                        f"{shown(path)}: an image without a mask; expected {shown(mask)}"
                    )
                examples.append(layout.Example(f"{split}/{stem}", split, None, path, masks[stem]))
        return examples
