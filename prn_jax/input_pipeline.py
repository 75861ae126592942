"""Records -> batches: cache, sampling plan, synthesis, each host's share, prefetch.

What stands in a slot of a batch is a function of the seed, the step and the slot alone. So a run is
reproducible, resumes by starting the plan at its step, and does not depend on the number of hosts.
"""

import concurrent.futures
import dataclasses
import io
import itertools
import os
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from prn_jax import datasets, images
from prn_jax.errors import UserError
from prn_jax.synthesis import augment
from prn_jax.synthesis.augment import Draws
from prn_jax.synthesis.extended import Extend
from prn_jax.synthesis.foreground import cached_foreground, foreground_points
from prn_jax.synthesis.simulated import Simulate, blend, roughness
from prn_jax.synthesis.textures import load_textures

KINDS = ("normal", "seen", "extended", "simulated")
NORMAL, SEEN, EXTENDED, SIMULATED = range(4)
# Slots after which the plan of kinds repeats: shares are met to a thousandth.
_PERIOD = 1000


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of one split, decoded and resized.

    Attributes:
      image: uint8 [n, h, w, 3].
      mask: uint8 [n, h, w] in {0, 1}.
      defect: names, "good" for a normal image.
      id: paths below the category, without extension.
      has_mask: whether `mask` is known, bool [n]: of normal images, and of defects with a mask.
    """

    image: np.ndarray
    mask: np.ndarray
    defect: list[str]
    id: list[str]
    has_mask: np.ndarray | None = None

    def __post_init__(self):
        if self.has_mask is None:
            object.__setattr__(self, "has_mask", np.ones(len(self.id), bool))

    def __len__(self) -> int:
        return len(self.id)

    @property
    def label(self) -> np.ndarray:
        """1 for an anomalous image, 0 for a normal one, int [n]."""
        return np.array([defect != "good" for defect in self.defect], int).reshape(-1)

    def select(self, chosen: Sequence[bool]) -> "Images":
        """Those whose entry is true."""
        index = np.flatnonzero(np.asarray(chosen, bool))
        return Images(
            self.image[index],
            self.mask[index],
            [self.defect[i] for i in index],
            [self.id[i] for i in index],
            self.has_mask[index],
        )


@dataclasses.dataclass(frozen=True)
class CategoryData:
    """One category, ready for training and evaluation.

    Attributes:
      train: normal images.
      seen: the seen anomalies, which train.
      test: the test split without the seen anomalies.
      foreground: where the product is on each of `train`, uint8 [n, h, w] in {0, 1}.
      is_object: False for a texture, which is all foreground.
      white_level: the level of a 16-bit file that became 255; 0 where all files have 8 bits.
      fingerprint: of the raw files.
    """

    train: Images
    seen: Images
    test: Images
    foreground: np.ndarray
    is_object: bool
    white_level: int = 0
    fingerprint: str = ""


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

    Raises:
      UserError: there are fewer.
    """
    known = set(ids) if usable is None else {x for x, good in zip(ids, usable) if good}
    if num_seen > len(known):
        lacking = f" ({len(ids)}, but only so many with a mask)" if len(known) < len(ids) else ""
        raise UserError(
            f"num_seen={num_seen}, but there are only {len(known)} anomalous images to draw "
            f"from{lacking}: lower num_seen (0 trains without any)"
        )
    ids = sorted(ids)
    np.random.RandomState(seed).shuffle(ids)
    return sorted([x for x in ids if x in known][:num_seen])


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
    size = tuple(config.image_size)
    train, test = (read_split(builder, split, size) for split in ("train", "test"))
    source = test if builder.seen_from == "test" else train
    anomalous = source.select(source.label == 1)
    usable = anomalous.has_mask & anomalous.mask.any(axis=(1, 2))
    seen = set(seen_split(anomalous.id, config.num_seen, config.split_seed, usable))
    lacking = [x for split in (train, test) for x, known in zip(split.id, split.has_mask)
               if not known]  # fmt: skip
    if lacking:
        logging.warning(
            "%s: %d anomalous images have no mask (%s): they count for the image-level figures "
            "alone, and are not drawn as seen ones",
            category, len(lacking), ", ".join(lacking[:5]),
        )  # fmt: skip
    normal = train.select(train.label == 0)
    if not len(normal):
        raise UserError(f"{config.data.name} {category}: there are no normal images to train on")
    foreground, is_object = cached_foreground(normal.image, builder.data_path)
    logging.info(
        "%s: %s",
        category,
        f"an object on {foreground.mean():.0%} of the image" if is_object else "all foreground",
    )
    return CategoryData(
        train=normal,
        seen=source.select([x in seen for x in source.id]),
        test=test.select([x not in seen for x in test.id]) if source is test else test,
        foreground=foreground,
        is_object=is_object,
        white_level=int((builder.info.metadata or {}).get("white_level", 0)),
        fingerprint=builder.fingerprint or "",
    )


def read_split(builder: tfds.core.DatasetBuilder, split: str, size: tuple[int, int]) -> Images:
    """Decodes and resizes a split as prediction does, by `images`, several images at a time."""
    found, vanished = [], []

    def read(record):
        mask = np.asarray(Image.open(io.BytesIO(record["mask"])))
        small = images.resize_mask(mask, size)
        if mask.any() and not small.any():
            vanished.append((record["id"].decode(), mask))
        return (
            images.resize(images.decode(record["image"]), size), small,
            record["defect"].decode(), record["id"].decode(), bool(record["has_mask"]),
        )  # fmt: skip

    if split in builder.info.splits:
        records = iter(
            builder.as_dataset(
                split=split,
                read_config=tfds.ReadConfig(try_autocache=False),
                shuffle_files=False,
                decoders={x: tfds.decode.SkipDecoding() for x in ("image", "mask")},
            ).as_numpy_iterator()
        )
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            while some := list(itertools.islice(records, 64)):  # encoded images held at a time
                found.extend(pool.map(read, some))
    _say_vanished(split, sorted(vanished, key=lambda x: x[0]), size)
    image, mask, defect, id_, has_mask = zip(*found) if found else [()] * 5
    return Images(
        np.array(image, np.uint8).reshape(-1, *size, 3),
        np.array(mask, np.uint8).reshape(-1, *size),
        list(defect),
        list(id_),
        np.array(has_mask, bool),
    )


def _say_vanished(
    split: str, vanished: list[tuple[str, np.ndarray]], size: tuple[int, int]
) -> None:
    """Warns of masks of which nothing is left at `size`, and says which size keeps them."""
    if not vanished:
        return
    factor = 2
    while not all(
        images.resize_mask(mask, (size[0] * factor, size[1] * factor)).any() for _, mask in vanished
    ):
        factor += 1
    logging.warning(
        "%s: nothing is left of %d masks at image_size=(%d,%d), of %s: their images are not drawn "
        "as seen ones; image_size=(%d,%d) keeps them",
        split, len(vanished), *size, ", ".join(x for x, _ in vanished[:5]),
        *(x * factor for x in size),
    )  # fmt: skip


# --- the plan -------------------------------------------------------------------------------------


def plan_kinds(config: ConfigDict, num_seen: int) -> np.ndarray:
    """The kinds of `_PERIOD` slots one after another, interleaved as evenly as can be.

    Each slot goes to the kind that lags most behind its share. Without seen anomalies their slots
    and the extended ones go to simulated anomalies.

    Raises:
      UserError: the shares are negative or do not sum to 1.
    """
    shares = np.array([config.sampling[kind] for kind in KINDS], float)
    if shares.min() < 0 or abs(shares.sum() - 1) > 1e-6:
        raise UserError(
            f"sampling.{{{', '.join(KINDS)}}} = {tuple(shares)}: give shares that sum to 1"
        )
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
    """Slot number -> kind, and which image, by shuffled passes over each kind's images.

    Slots are numbered through the whole run: slot j of step s is `s * batch_size + j`.
    """

    def __init__(self, config: ConfigDict, num_normal: int, num_seen: int):
        kinds = plan_kinds(config, num_seen)
        before = np.stack([np.cumsum(kinds == kind) - (kinds == kind) for kind in range(4)])
        self._seed = config.seed
        self._kinds = tf.constant(kinds)
        self._before = tf.constant(before, tf.int64)
        self._per_period = tf.constant(np.bincount(kinds, minlength=4), tf.int64)
        # Normal, extended and simulated ones are based on normal images.
        self._sizes = tf.constant([num_normal, max(1, num_seen), num_normal, num_normal], tf.int64)

    def __call__(self, slot: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Kind, int32, and image number, int64, of a slot, int64."""
        phase = tf.cast(slot % _PERIOD, tf.int32)
        kind = self._kinds[phase]
        count = slot // _PERIOD * self._per_period[kind] + self._before[kind, phase]
        size = self._sizes[kind]
        epoch = tf.cast(count // size, tf.int32)
        index = tf.random.experimental.index_shuffle(
            count % size, seed=tf.stack([self._seed, 4 * epoch + kind]), max_index=size - 1
        )
        return kind, index


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
      data: from `load_category`.
      total_steps: of the run.
      start_step: the first to make.
      process_index: this process.
      process_count: of how many.
      parallel_calls: samples made at a time; does not change them.

    Returns:
      Dictionaries of `image` uint8 [b, h, w, 3], `mask` uint8 [b, h, w] in {0, 1} and `kind` int32
      [b], an index into `KINDS`.

    Raises:
      UserError: the batch does not divide among the processes, or textures or shares are wrong.
    """
    if config.batch_size % process_count:
        raise UserError(
            f"batch_size={config.batch_size} cannot be divided among {process_count} processes"
        )
    local = config.batch_size // process_count
    make_sample = SampleMaker(config, data)

    def slots(step: tf.Tensor) -> tf.data.Dataset:
        first = step * config.batch_size + process_index * local
        return tf.data.Dataset.range(first, first + local)

    steps = tf.data.Dataset.range(start_step, total_steps)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.ram_budget = 512 * 2**20
    batches = (
        steps.flat_map(slots)
        .map(make_sample, num_parallel_calls=parallel_calls, deterministic=True)
        .batch(local, drop_remainder=True)
        .prefetch(4)
        .with_options(options)
    )
    return batches.as_numpy_iterator()


class SampleMaker:
    """Slot number -> one training sample, in TensorFlow ops.

    Args:
      config: see configs/default.py.
      data: from `load_category`.
    """

    def __init__(self, config: ConfigDict, data: CategoryData):
        self._config = config.synthesis
        self._seed = config.seed
        size = tuple(config.image_size)
        self._plan = Plan(config, len(data.train), len(data.seen))
        self._normals = tf.constant(data.train.image)
        self._foreground = tf.constant(data.foreground)
        self._points = tf.constant(foreground_points(data.foreground))
        self._has_seen = len(data.seen) > 0
        self._seen = tf.constant(data.seen.image), tf.constant(data.seen.mask)
        self.textures = load_textures(
            config.synthesis.textures,
            size,
            config.synthesis.max_textures,
            data_dir=config.data.data_dir,
            exclude=config.category,
        )
        self._simulate = Simulate(
            size, tf.constant(self.textures), config.synthesis, data.is_object
        )
        if self._has_seen:
            self._extend = Extend(data.seen.image, data.seen.mask, config.synthesis)
        self._min_pixels = max(1, round(config.synthesis.min_area * size[0] * size[1]))
        self._roughness = tf.constant(roughness(data.train.image))

    def __call__(self, slot: tf.Tensor) -> dict[str, tf.Tensor]:
        """`image` uint8 [h, w, 3], `mask` uint8 [h, w] in {0, 1} and `kind` int32."""
        kind, index = self._plan(slot)
        image, mask = self.make(kind, index, slot)
        return {"image": image, "mask": mask, "kind": kind}

    def make(
        self, kind: tf.Tensor, index: tf.Tensor, slot: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """A sample of the given kind, from image `index`, with the random numbers of `slot`."""
        # A long run's slot numbers outgrow 32 bits: both parts of them count.
        high, low = (tf.cast(x, tf.int32) for x in (slot // 2**31, slot % 2**31))
        seed = tf.random.experimental.stateless_fold_in(tf.stack([self._seed, high]), low)
        branches = [lambda: self._normal(index, seed)]
        if self._has_seen:
            branches += [lambda: self._seen_one(index, seed), lambda: self._extended(index, seed)]
        else:
            branches += [lambda: self._simulated(index, seed)] * 2
        branches.append(lambda: self._simulated(index, seed))
        image, mask = tf.switch_case(kind, branches)
        shape = self._normals.shape[1:]
        return tf.ensure_shape(image, shape), tf.ensure_shape(mask, shape[:2])

    def _normal(self, index, seed):
        image = self._normals[index]
        mask = tf.zeros(image.shape[:2], tf.uint8)
        return self._lightly(image, mask, self._config.augment_normal, Draws(seed))

    def _seen_one(self, index, seed):
        image, mask = (x[index] for x in self._seen)
        return self._lightly(image, mask, self._config.augment_seen, Draws(seed))

    def _lightly(self, image, mask, probability, draws):
        """Light augmentation that keeps the label: brightness and a small shift."""
        if not probability:
            return image, mask

        def change():
            size = tf.cast(tf.shape(image)[:2], tf.float32)
            shift = (2.0 * draws.vector(2) - 1.0) * self._config.shift * size
            both = tf.concat([image, mask[..., None] * 255], -1)
            origin = tf.zeros(2)
            both = augment.warp(both, 0.0, 1.0, origin, tf.round(shift), mirror=True)
            bright = augment.brightness(
                both[..., :3], draws.uniform(0.9, 1.1), draws.uniform(-10.0, 10.0)
            )
            return bright, tf.cast(both[..., 3] >= 128, tf.uint8)

        return tf.cond(draws.chance(probability), change, lambda: (image, mask))

    def _extended(self, index, seed):
        points = self._points[index]
        return self._until_visible(
            index,
            seed,
            lambda image, foreground, draws: self._extend(image, foreground, points, draws),
            contrast=0.0,  # real defects are as plain as they are
        )

    def _simulated(self, index, seed):
        contrast = self._config.simulated_contrast * self._roughness[index]
        return self._until_visible(index, seed, self._simulate, contrast)

    def _until_visible(self, index, seed, synthesise, contrast):
        """Draws anew until the anomaly shows; the mask covers only what really changed.

        Where the image is rough by itself, half of the mask must change by `contrast` more.
        """
        normal = self._normals[index]
        foreground = self._foreground[index] > 0
        least = self._config.visible_change

        def attempt(number, image, mask, shows):
            draws = Draws(tf.random.experimental.stateless_fold_in(seed, number))
            image, mask = synthesise(normal, foreground, draws)
            change = tf.where(mask, _difference(normal, image), 0)
            mask = change >= least
            plain = change >= tf.cast(tf.math.ceil(least + contrast), change.dtype)
            count, plainly = (tf.math.count_nonzero(x, dtype=tf.int32) for x in (mask, plain))
            return number + 1, image, mask, (count >= self._min_pixels) & (2 * plainly >= count)

        def unseen(number, image, mask, shows):
            return ~shows & (number < self._config.attempts)

        start = (tf.constant(0), normal, tf.zeros_like(foreground), tf.constant(False))
        _, image, mask, _ = tf.while_loop(unseen, attempt, start)
        image, mask = tf.cond(
            tf.math.count_nonzero(mask, dtype=tf.int32) < self._min_pixels,
            lambda: self._square(normal, self._points[index], Draws(seed)),
            lambda: (tf.where(mask[..., None], image, normal), mask),
        )
        return image, tf.cast(mask, tf.uint8)

    def _square(self, normal, points, draws):
        """What is left when every attempt failed: a square of other grey values, always seen."""
        height, width = normal.shape[:2]
        middle = points[draws.integer(tf.shape(points)[0])]
        reach = tf.cast(tf.math.ceil(tf.sqrt(float(self._min_pixels))), tf.float32)
        rows = tf.abs(tf.range(height, dtype=tf.float32) - middle[0]) <= reach
        columns = tf.abs(tf.range(width, dtype=tf.float32) - middle[1]) <= reach
        mask = rows[:, None] & columns[None]
        # Modulo 256: each value moves by 128.
        other = normal + tf.constant(128, tf.uint8)
        return blend(normal, other, mask, tf.constant(1.0)), mask


def _difference(a, b):
    """Largest difference over the channels of uint8 [h, w, 3], int32 [h, w]."""
    return tf.cast(tf.reduce_max(tf.maximum(a, b) - tf.minimum(a, b), axis=-1), tf.int32)
