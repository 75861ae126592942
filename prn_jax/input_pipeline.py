"""Records -> batches: cache, sampling plan, synthesis, each host's share, prefetch.

What stands in a slot of a batch is a function of the seed, the step and the slot alone. So a run is
reproducible, resumes by starting the plan at its step, and does not depend on the number of hosts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from prn_jax import datasets, disk
from prn_jax.datasets.roi import from_text
from prn_jax.errors import UserError
from prn_jax.fields import looks
from prn_jax.splits import (
    Images,
    check_num_seen,
    copies_within,
    leave_out,
    read_split,
    say_both,
    within,
)
from prn_jax.synthesis.foreground import cached_foreground, describe
from prn_jax.synthesis.pose import Turn, free_turns
from prn_jax.synthesis.samples import EXTENDED, KINDS, NORMAL, SEEN, SIMULATED, SampleMaker
from prn_jax.synthesis.textures import prepare_dtd
from prn_jax.tiles import Tiling

# Slots after which the plan of kinds repeats: shares are met to a thousandth.
_PERIOD = 1000


@dataclasses.dataclass(frozen=True)
class CategoryData:
    """One category, ready for training and evaluation.

    Attributes:
      train: normal images.
      seen: the seen anomalies, which train.
      test: the test split without the seen anomalies.
      held: normal images of the training split that are not trained on.
      roi: where an image counts, uint8 [h, w] in {0, 1}; None: everywhere. No mask marks, and no
        foreground covers, anything outside of it.
      foreground: where the product is on each of `train`, uint8 [n, h, w] in {0, 1}.
      is_object: False for a texture, which is all foreground.
      white_level: the level of a 16-bit file that became 255; 0 where all files have 8 bits.
      fingerprint: of the raw files.
    """

    train: Images
    seen: Images
    test: Images
    held: Images
    foreground: np.ndarray
    is_object: bool
    white_level: int = 0
    fingerprint: str = ""
    roi: np.ndarray | None = None


# --- loading --------------------------------------------------------------------------------------


def seen_split(
    ids: Sequence[str], num_seen: int, seed: int, usable: Sequence[bool] | None = None
) -> list[str]:
    """Draws the seen anomalies: sort, shuffle by `RandomState(seed)`, take the first (CPR's rule).

    Args:
      ids: the anomalous images to draw from, in any order.
      num_seen: how many.
      seed: of the shuffle.
      usable: which of them have a mask, that all others are passed over for; default: all.
    """
    known = set(ids) if usable is None else {x for x, good in zip(ids, usable) if good}
    ids = sorted(ids)
    np.random.RandomState(seed).shuffle(ids)
    return sorted([x for x in ids if x in known][:num_seen])


def holdout_split(ids: Sequence[str], share: float, seed: int) -> list[str]:
    """Draws the normal images that are not trained on: sort, shuffle by `RandomState(seed)`.

    Args:
      ids: the normal training images.
      share: of them, in [0, 1), rounded to whole images.
      seed: of the shuffle.
    """
    ids = sorted(ids)
    np.random.RandomState(seed).shuffle(ids)
    return sorted(ids[: min(round(share * len(ids)), len(ids) - 1)])


def load_category(config: ConfigDict, category: str) -> CategoryData:
    """Prepares, reads and resizes one category; estimates its foreground.

    Raises:
      UserError: the data is missing or wrong, or has too few anomalies for `config.num_seen`.
    """
    builder = datasets.prepare(
        config.data.name,
        category,
        manual_dir=config.data.manual_dir,
        data_dir=config.data.data_dir,
    )
    if config.synthesis.textures == "dtd" and config.total_steps:
        prepare_dtd(config.data.data_dir)
    size, metadata = Tiling.of(config).size, builder.info.metadata or {}
    train, test = (read_split(builder, split, size) for split in ("train", "test"))
    roi = from_text(metadata["roi"], size) if "roi" in metadata else None
    if roi is not None:
        if not roi.any():
            raise UserError(
                f"{category}: nothing is left of roi.png at image_size={tuple(config.image_size)}: "
                "paint a larger region, or give a larger image_size"
            )
        logging.info("%s: the region of interest is %.0f %%", category, 100 * roi.mean())
        train, test = (within(split, roi, category) for split in (train, test))
    normal, seen, test, held = _divide(config, category, train, test, builder.seen_from)
    foreground, is_object = cached_foreground(normal.image, builder.data_path)
    logging.info("%s: foreground: %s", category, describe(foreground, is_object))
    if roi is not None:
        inside = foreground & roi
        foreground = np.where(inside.any(axis=(1, 2), keepdims=True), inside, roi)
    return CategoryData(
        train=normal,
        seen=seen,
        test=test,
        held=held,
        foreground=foreground,
        is_object=is_object,
        white_level=int(metadata.get("white_level", 0)),
        fingerprint=builder.fingerprint or "",
        roi=roi,
    )


def _divide(
    config: ConfigDict, category: str, train: Images, test: Images, seen_from: str
) -> tuple[Images, Images, Images, Images]:
    """Normal images, seen anomalies, test images and held ones: none of them twice."""
    source = test if seen_from == "test" else train
    anomalous = source.select(source.label == 1)
    check_num_seen(config.num_seen, category, len(anomalous), int(anomalous.has_mask.sum()))
    seen = set(seen_split(anomalous.id, config.num_seen, config.split_seed, anomalous.has_mask))
    drawn = source.select([x in seen for x in source.id])
    test = test.select([x not in seen for x in test.id]) if source is test else test
    test = leave_out(
        test, copies_within(test), "test images are copies of others of them", f"{category}: "
    )
    say_both(test, f"{category}: ")
    normal = train.select(train.label == 0)
    defects = {*anomalous.digests, *itertools.compress(test.digests, test.label)}
    normal = leave_out(
        normal,
        [x in defects for x in normal.digests],
        "normal training images are defects, to the pixel,",
        f"{category}: ",
    )
    if not len(normal):
        raise UserError(
            f"{config.data.name}/{category}: there are no normal images to train on; add some"
        )
    held_out = set(holdout_split(normal.id, config.data.holdout, config.split_seed))
    held = normal.select([x in held_out for x in normal.id])
    normal = normal.select([x not in held_out for x in normal.id])
    known = {*normal.digests, *drawn.digests}
    copies = "are copies of images that are trained on"
    test = leave_out(
        test, [x in known for x in test.digests], f"test images {copies}", f"{category}: "
    )
    known |= {*test.digests}
    held = leave_out(
        held,
        [x in known for x in held.digests],
        f"normal images held out {copies} or tested on",
        f"{category}: ",
    )
    # Each counts in what a threshold promises of new ones.
    twice = "normal images held out are copies of others of them"
    held = leave_out(held, copies_within(held), twice, f"{category}: ")
    if len(drawn) and not test.label.any():
        logging.warning(
            "%s: no anomalous images are left to test on: lower num_seen (%d) to keep some",
            category, config.num_seen,
        )  # fmt: skip
    return normal, drawn, test, held


# --- the plan -------------------------------------------------------------------------------------


def plan_kinds(config: ConfigDict, num_seen: int) -> np.ndarray:
    """The kinds of `_PERIOD` slots one after another, interleaved as evenly as can be.

    Each slot goes to the kind that lags most behind its share. Without seen anomalies their slots
    and the extended ones go to simulated anomalies.
    """
    shares = np.array([config.sampling[kind] for kind in KINDS], float)
    if not num_seen:
        shares[SIMULATED] += shares[SEEN] + shares[EXTENDED]
        shares[SEEN] = shares[EXTENDED] = 0
    given = np.zeros(4)
    kinds = np.zeros(_PERIOD, np.int32)
    for slot in range(_PERIOD):
        # The small preference makes ties fall the same way on every machine.
        lag = shares * (slot + 1) - given - 1e-9 * np.arange(4)
        kinds[slot] = np.argmax(np.where(shares > 0, lag, -np.inf))
        given[kinds[slot]] += 1
    return kinds


class Plan:
    """Slots' numbers -> kinds, and which images, by shuffled passes over each kind's images.

    Slots are numbered through the whole run: slot j of step s is `s * batch_size + j`.
    """

    def __init__(self, config: ConfigDict, num_normal: int, num_seen: int):
        kinds = plan_kinds(config, num_seen)
        before = np.stack([np.cumsum(kinds == kind) - (kinds == kind) for kind in range(4)])
        self._seed = config.seed
        self._kinds = tf.constant(kinds)
        self._before = tf.constant(before, tf.int64)
        self._per_period = tf.constant(np.bincount(kinds, minlength=4), tf.int64)
        # Extended and simulated ones are based on normal images.
        sizes = {kind: num_normal for kind in (NORMAL, EXTENDED, SIMULATED)}
        sizes[SEEN] = max(1, num_seen)
        self._sizes = tf.constant([sizes[kind] for kind in range(4)], tf.int64)

    def __call__(self, slots: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Kinds, int32 [n], and image numbers, int64 [n], of slots, int64 [n]."""
        phase = slots % _PERIOD
        kinds = tf.gather(self._kinds, phase)
        before = tf.gather_nd(self._before, tf.stack([tf.cast(kinds, tf.int64), phase], axis=1))
        counts = slots // _PERIOD * tf.gather(self._per_period, kinds) + before
        sizes = tf.gather(self._sizes, kinds)
        # A batch is of few passes: the order of each is drawn once.
        passes, which = tf.unique(4 * tf.cast(counts // sizes, tf.int32) + kinds)
        orders = tf.map_fn(self._order, passes)
        places = tf.stack([which, tf.cast(counts % sizes, tf.int32)], axis=1)
        return kinds, tf.cast(tf.gather_nd(orders, places), tf.int64)

    def _order(self, number: tf.Tensor) -> tf.Tensor:
        """The order of one pass over a kind's images, 4 * pass + kind; padded to the longest."""
        size = self._sizes[number % 4]
        order = tf.argsort(tf.random.stateless_uniform([size], tf.stack([self._seed, number])))
        return tf.pad(order, [[0, tf.reduce_max(self._sizes) - size]])


# --- batches --------------------------------------------------------------------------------------


def train_batches(
    config: ConfigDict,
    data: CategoryData,
    *,
    total_steps: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    parallel_calls: int = tf.data.AUTOTUNE,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the batches of steps `start_step` .. `total_steps` - 1.

    The parts of all processes, one after another, are the batch of a single process.

    Args:
      config: see configs/default.py; `batch_size` is over all processes.
      data: from `load_category`; tiles of its images train, where `config.tiles` says so.
      total_steps: of the run.
      start_step: the first to make.
      process_index: this process.
      process_count: of how many.
      parallel_calls: samples made at a time; does not change them.

    Returns:
      Dictionaries of `image` uint8 [b, h, w, 3], `mask` uint8 [b, h, w] in {0, 1} and `kind` int32
      [b], an index into `KINDS`.

    Raises:
      UserError: the batch does not divide among the processes, or the textures are wrong.
    """
    if config.batch_size % process_count:
        raise UserError(
            f"batch_size={config.batch_size} cannot be divided among {process_count} processes: "
            f"give a multiple of {process_count}"
        )
    local = config.batch_size // process_count
    data = in_tiles(config, data)
    plan, make = Plan(config, len(data.train), len(data.seen)), sample_maker(config, data)

    # Written in TensorFlow's own conditions and loops: rewriting it takes seconds, for nothing.
    @tf.autograph.experimental.do_not_convert
    def sample(slot: tf.Tensor, kind: tf.Tensor, index: tf.Tensor) -> dict[str, tf.Tensor]:
        image, mask = make(kind, index, slot)
        return {"image": image, "mask": mask, "kind": kind}

    @tf.autograph.experimental.do_not_convert
    def planned(step: tf.Tensor) -> tf.data.Dataset:
        slots = step * config.batch_size + process_index * local + tf.range(local, dtype=tf.int64)
        return tf.data.Dataset.from_tensor_slices((slots, *plan(slots)))

    steps = tf.data.Dataset.range(start_step, total_steps)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.ram_budget = 512 * 2**20
    batches = (
        steps.flat_map(planned)
        .map(sample, num_parallel_calls=parallel_calls, deterministic=True)
        .batch(local, drop_remainder=True)
        .prefetch(4)
        .with_options(options)
    )
    return batches.as_numpy_iterator()


def in_tiles(config: ConfigDict, data: CategoryData) -> CategoryData:
    """One category whose images to train on are cut into tiles, each an image by itself.

    Of a seen anomaly only the tiles that its mask marks are kept, of normal images those that have
    some of the region of interest. A tile beside the product is foreground wherever it counts.
    """
    tiling = Tiling.of(config)
    if tiling.count == 1:
        return data

    def cut(array: np.ndarray) -> np.ndarray:
        tiles = disk.zeros((len(array) * tiling.count, *tiling.tile, *array.shape[3:]), array.dtype)
        for number, one in enumerate(array):
            if one.any():  # what nothing is written to takes no memory
                tiles[number * tiling.count :][: tiling.count] = tiling.cut(one[None])
        return tiles

    def cut_all(images: Images) -> Images:
        repeat = functools.partial(np.repeat, repeats=tiling.count)
        names = [f"{x} ({place + 1})" for x in images.id for place in range(tiling.count)]
        return Images(
            cut(images.image), cut(images.mask), list(repeat(images.defect)), names
        )  # fmt: skip

    seen, foreground = cut_all(data.seen), cut(data.foreground)
    whole = tiling.cut((np.ones(tiling.size, np.uint8) if data.roi is None else data.roi)[None])
    for number in np.flatnonzero(~foreground.any(axis=(1, 2))):
        foreground[number] = whole[number % tiling.count]
    inside = np.flatnonzero(np.tile(tiling.counting(data.roi), len(data.train)))
    return dataclasses.replace(
        data, train=cut_all(data.train).pick(inside), seen=seen.select(seen.has_mask),
        foreground=disk.rows(foreground, inside), roi=None,
    )  # fmt: skip


def turns(config: ConfigDict, data: CategoryData) -> tuple[Turn, ...]:
    """In which the images to train on, or their tiles, could lie as well; () if nothing asks."""
    if config.backbone.doublings and not config.average_turns:
        return ()
    data = in_tiles(config, data)
    found = tuple(free_turns(data.train.image, data.roi))
    posed = len(found) < 2
    if config.average_turns and not posed:
        logging.info(
            "%s: maps are the mean over %d of 8 turns, at so many times the work of prediction "
            "(average_turns=False: over one)", config.category, len(found),
        )  # fmt: skip
    if not config.backbone.doublings:
        logging.info(
            "%s: %s pose, so it is looked at with backbone.doublings=%s", config.category,
            "has a" if posed else "has no", looks(config, posed=posed)[0],
        )  # fmt: skip
    return found


def sample_maker(config: ConfigDict, data: CategoryData) -> SampleMaker:
    """What makes the samples of one category, from `in_tiles`."""
    return SampleMaker(
        config,
        normal=data.train.image,
        foreground=data.foreground,
        is_object=data.is_object,
        seen=data.seen.image,
        seen_mask=data.seen.mask,
        seen_defect=data.seen.defect,
        roi=data.roi,
    )
