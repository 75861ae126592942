"""The images of one split of a category: read, resized, and which of their pixels can be judged."""

import dataclasses
import functools
import hashlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from absl import logging
from PIL import Image

from prn_jax import disk, images
from prn_jax.errors import UserError, shown, shown_first
from prn_jax.masks import resize_mask
from prn_jax.metrics import judgeable
from prn_jax.parallel import several_at_a_time

if TYPE_CHECKING:
    from prn_jax.datasets.base import AnomalyBuilder


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of one split, decoded and resized.

    Attributes:
      image: uint8 [n, h, w, 3].
      mask: uint8 [n, h, w] in {0, 1}.
      defect: names, "good" for a normal image.
      id: paths below the category, without extension.
    """

    image: np.ndarray
    mask: np.ndarray
    defect: list[str]
    id: list[str]

    def __len__(self) -> int:
        return len(self.id)

    @property
    def label(self) -> np.ndarray:
        """1 for an anomalous image, 0 for a normal one, int [n]."""
        return np.array([defect != "good" for defect in self.defect], int).reshape(-1)

    @functools.cached_property
    def has_mask(self) -> np.ndarray:
        """Whether the pixels can be judged, bool [n], see `metrics.judgeable`."""
        return judgeable(self.label, self.mask)

    @functools.cached_property
    def digests(self) -> list[str]:
        """Tell the images' pixels from others', whatever the files are called."""
        return [hashlib.sha256(np.ascontiguousarray(image)).hexdigest() for image in self.image]

    def select(self, chosen: Sequence[bool]) -> "Images":
        """Those whose entry is true."""
        return self.pick(np.flatnonzero(np.asarray(chosen, bool)))

    def pick(self, index: np.ndarray) -> "Images":
        """Those of these numbers."""
        return Images(
            disk.rows(self.image, index),
            disk.rows(self.mask, index),
            [self.defect[i] for i in index],
            [self.id[i] for i in index],
        )


def within(split: Images, roi: np.ndarray, category: str) -> Images:
    """Images whose masks mark nothing outside of the region of interest; says which are lost."""
    mask = disk.zeros(split.mask.shape, np.uint8)
    for number, one in enumerate(split.mask):
        if one.any():  # what nothing is written to takes no memory
            np.multiply(one, roi, out=mask[number])
    found = dataclasses.replace(split, mask=mask)
    outside = [x for x, gone in zip(split.id, split.has_mask & ~found.has_mask) if gone]
    what = "the defects of %d images lie outside of the region of interest"
    say_unmarked(category, what, outside)
    return found


def say_unmarked(
    category: str, what: str, ids: Sequence[str], also: str = ", and are not drawn as seen ones"
) -> None:
    """Warns of anomalous images of which no pixel can be judged, if there are any."""
    if ids:
        logging.warning(
            "%s: %s (%s): they count for the image-level figures alone%s",
            category, what % len(ids), shown_first(ids), also,
        )  # fmt: skip


def copies_within(images: Images) -> list[bool]:
    """Which images are copies of another one of the same label; one with a mask is none."""
    keys, first = list(zip(images.digests, images.label)), {}
    for number in np.argsort(~images.has_mask, kind="stable"):
        first.setdefault(keys[number], number)
    kept = set(first.values())
    return [number not in kept for number in range(len(images))]


def say_both(images: Images, whose: str = "") -> None:
    """Warns of pictures that are there as a normal image and as a defect."""
    labels: dict[str, set[int]] = {}
    for digest, label in zip(images.digests, images.label):
        labels.setdefault(digest, set()).add(int(label))
    both = [id_ for digest, id_ in zip(images.digests, images.id) if len(labels[digest]) > 1]
    if both:
        logging.warning(
            "%s%d images are the same as another of the other kind, normal or anomalous, and stay: "
            "remove the wrong ones of %s", whose, len(both), shown_first(both),
        )  # fmt: skip


def leave_out(images: Images, out: Sequence[bool], what: str, whose: str = "") -> Images:
    """Those whose entry is false; names the others, of which `what` says why."""
    names = [id_ for id_, is_out in zip(images.id, out) if is_out]
    if not names:
        return images
    logging.warning(
        "%s%d of %d %s and are left out: %s",
        whose, len(names), len(images), what, shown_first(names),
    )  # fmt: skip
    return images.select(~np.array(out, bool))


def check_num_seen(num_seen: int, category: str, there: int, usable: int) -> None:
    """Refuses to draw more seen anomalies than there are.

    Args:
      num_seen: how many are to be drawn.
      category: of which.
      there: anomalous images.
      usable: of them that have a mask.

    Raises:
      UserError: there are fewer.
    """
    if num_seen > usable:
        lacking = f" ({there}, but only so many with a mask)" if usable < there else ""
        raise UserError(
            f"{category}: num_seen={num_seen}, but there are only {usable} anomalous images to "
            f"draw from{lacking}: lower num_seen (0 trains without any); "
            f"--config.category={category} trains this one by itself"
        )


def read_split(builder: "AnomalyBuilder", split: str, size: tuple[int, int]) -> Images:
    """Decodes and resizes a split as prediction does, by `images`, several images at a time."""
    count = builder.info.splits[split].num_examples if split in builder.info.splits else 0
    image, mask = disk.zeros((count, *size, 3), np.uint8), disk.zeros((count, *size), np.uint8)
    found, lacking, vanished = [], [], []

    def read(number, record):
        image[number] = images.resize(images.decode(record["image"]), size)
        large = _mask(record["mask"])
        if large.any():  # what nothing is written to takes no memory
            mask[number] = resize_mask(large, size)
            if not mask[number].any():
                vanished.append((record["id"].decode(), record["mask"]))
        if not record["has_mask"]:
            lacking.append(record["id"].decode())
        return record["defect"].decode(), record["id"].decode()

    if count:
        found = _over_records(builder, split, read)
    category = builder.category
    say_unmarked(category, "%d anomalous images have no mask", sorted(lacking))
    _say_vanished(category, sorted(vanished, key=lambda x: x[0]), size)
    defect, id_ = zip(*found) if found else [()] * 2
    return Images(image, mask, list(defect), list(id_))


def _over_records(builder, split, read):
    """What `read` makes of each numbered record of a split, in order; several at a time."""
    # Only here: who judges or remembers images that were read needs no TensorFlow.
    import tensorflow as tf
    import tensorflow_datasets as tfds

    try:
        records = enumerate(
            builder.as_dataset(
                split=split,
                read_config=tfds.ReadConfig(try_autocache=False),
                shuffle_files=False,
                decoders={x: tfds.decode.SkipDecoding() for x in ("image", "mask")},
            ).as_numpy_iterator()
        )
        return list(several_at_a_time(lambda numbered: read(*numbered), records))
    except tf.errors.OpError as error:
        raise UserError(
            f"the TFRecords in {shown(builder.data_dir)} cannot be read ({error.message}): where "
            "they are damaged, remove that folder, and they are made anew of the raw files"
        ) from error


def _mask(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def _say_vanished(category: str, vanished: list[tuple[str, bytes]], size: tuple[int, int]) -> None:
    """Warns of masks of which nothing is left at `size`, and says which size keeps them."""
    if not vanished:
        return
    factor = 2
    while not all(
        resize_mask(_mask(x), (size[0] * factor, size[1] * factor)).any() for _, x in vanished
    ):
        factor += 1
    height, width = (x * factor for x in size)
    what = "nothing is left of %d masks at image_size=({},{}), which image_size=({},{}) keeps"
    say_unmarked(category, what.format(*size, height, width), [x for x, _ in vanished])
