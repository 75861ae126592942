"""Anybody's own images, in MVTec AD's layout."""

import hashlib
import json
import os
import pathlib
import re

from absl import logging
from etils import epath

from prn_jax import images
from prn_jax.datasets import base, layout
from prn_jax.errors import UserError, normal_form, shown


class Folder(base.AnomalyBuilder, skip_registration=True):
    """`<product>/train/good`, `test/good`, `test/<defect>`, `ground_truth/<defect>/<stem>[_mask]`.

    Each product is a category; `data.manual_dir` holds the products' folders, or is one itself.
    Whatever Pillow reads (`images.extensions`) may be mixed, in sub-folders too; a mask's type
    needn't be its image's. Normal images need no masks, nor do defects, which then are not drawn as
    seen ones; there may be no defects, and no test images at all.
    """

    name = "folder"
    title = "your own images"
    licence = "yours"
    page = "docs/datasets.md"

    @classmethod
    def sources(cls, manual_dir: str | os.PathLike) -> dict[str, pathlib.Path]:
        """Returns the products' folders by the products' names."""
        if not os.fspath(manual_dir):  # not the current folder: there are none
            return {}
        root = pathlib.Path(os.path.realpath(os.path.expanduser(manual_dir)))
        if _is_product(root):
            return {normal_form(root.name): root}
        there = (x for x in layout.out_of_place(root, ()) if not x.name.startswith("."))
        return {normal_form(path.name): path for path in there if _is_product(path)}

    @classmethod
    def _records_name(
        cls, category: str, manual_dir: str | os.PathLike, data_dir: str | os.PathLike
    ) -> str:
        """Returns a name of the product and of where its raw files are.

        Two projects may have a product of the same name. Where `manual_dir` is not there, on
        another host or unmounted, the TFRecords of this product that there are count.

        Raises:
          UserError: there are those of several products.
        """
        name = _own_name(category, manual_dir)
        if _is_there(manual_dir):
            return name
        found = [folder for owner, folder in cls._records(data_dir) if owner == category]
        if name in found or not found:
            return name
        if len(found) > 1:
            root = epath.Path(os.path.expanduser(data_dir)) / cls.name
            origins = [_remembered(root / x / str(cls.VERSION)).get("source", x) for x in found]
            raise UserError(
                f"folder: {shown(data_dir)} has TFRecords of {len(found)} products {category!r}, "
                f"made from {', '.join(map(shown, origins))}: set data.manual_dir to one of these"
            )
        return found[0]

    @classmethod
    def prepared(cls, manual_dir: str | os.PathLike, data_dir: str | os.PathLike) -> set[str]:
        """Returns the products with TFRecords: of a folder that is there, those made of it."""
        own = _is_there(manual_dir)
        return {
            category
            for category, name in cls._records(data_dir)
            if not own or name == _own_name(category, manual_dir)
        }

    @classmethod
    def _category_of(cls, folder: epath.Path) -> str:
        """Returns the product whose TFRecords these are."""
        return _remembered(folder).get("category", folder.parent.name)

    @classmethod
    def nothing_found(cls, manual_dir: str | os.PathLike) -> UserError:
        """Returns the error where there is no product."""
        return cls._missing(manual_dir, "")

    @classmethod
    def look_for_slips(cls, manual_dir: str | os.PathLike, category: str = "") -> None:
        """Raises `UserError` where a product's folder of normal images is called otherwise."""
        if not os.fspath(manual_dir):  # not the current folder: there are no raw files
            return
        root = pathlib.Path(os.path.expanduser(manual_dir))
        products = [root / category] if category else layout.out_of_place(root, ())
        for product in (root, *products):
            if _is_product(product):
                continue
            layout.check_train(product / "train")
            if product != root and (found := _train_folder(product)):
                base.say_once(
                    logging.WARNING,
                    f"{shown(product)} has {shown(found)}, but no folder train/good: left out",
                )

    @classmethod
    def _missing(cls, manual_dir: str | os.PathLike, category: str) -> UserError:
        root = pathlib.Path(os.path.expanduser(manual_dir))
        product = category or "<product>"
        if not root.is_dir():
            return UserError(
                f"folder: no folder {shown(root)}; set data.manual_dir to your images' folder"
            )
        cls.look_for_slips(manual_dir, category)
        return UserError(
            f"folder: neither {shown(root / 'train/good')} nor "
            f"{shown(root / product / 'train/good')} is there; put the "
            f"normal images there or set data.manual_dir (the layout is in {cls.page})"
        )

    @classmethod
    def _scan(cls, folder: pathlib.Path, stray: list[pathlib.Path]) -> list[layout.Example]:
        return layout.scan_folders(
            folder, stray, normal=layout.GOOD, suffixes=("_mask", ""), needs_masks=False
        )


def _is_there(manual_dir: str | os.PathLike) -> bool:
    return bool(os.fspath(manual_dir)) and os.path.isdir(os.path.expanduser(manual_dir))


def _own_name(category: str, manual_dir: str | os.PathLike) -> str:
    root = pathlib.Path(os.path.realpath(os.path.expanduser(manual_dir)))
    source = root if normal_form(root.name) == category else root / category
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    return re.sub(r"[^\w.-]+", "_", category)[:60] + f"-{digest}"


def _is_product(folder: pathlib.Path) -> bool:
    return os.path.isdir(folder / "train" / layout.GOOD)  # not of what may not be entered


def _train_folder(folder: pathlib.Path) -> str:
    """What in a folder that is no product may be meant for training images; "" where nothing."""
    if images.why_skipped(folder) != "a folder":
        return ""
    found = (x.name for x in layout.out_of_place(folder, ()) if x.name.lower() == "train")
    return next(found, "")


def _remembered(folder: epath.Path) -> dict[str, str]:
    """What TFRecords keep beside them: `category` and `source`; an earlier version's neither."""
    try:
        return json.loads((folder / "metadata.json").read_text())
    except (OSError, ValueError):
        return {}
