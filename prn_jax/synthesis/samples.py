"""One training sample of any kind: a normal image, a seen anomaly, an extended or simulated one."""

import weakref
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from prn_jax import disk
from prn_jax.synthesis import augment
from prn_jax.synthesis.augment import Draws
from prn_jax.synthesis.blending import blend, is_grey, soften, to_grey
from prn_jax.synthesis.extended import Extend
from prn_jax.synthesis.foreground import foreground_points
from prn_jax.synthesis.pose import free_turns, turn
from prn_jax.synthesis.simulated import Simulate, roughness
from prn_jax.synthesis.textures import load_textures

KINDS = ("normal", "seen", "extended", "simulated")
NORMAL, SEEN, EXTENDED, SIMULATED = range(4)
_TURN = 0x7E2  # the draw of the turn is apart from what makes the sample


class SampleMaker:
    """Kind, image and slot number -> one training sample, in TensorFlow ops.

    Args:
      config: see configs/default.py.
      normal: normal images, uint8 [n, h, w, 3].
      foreground: where the product is on each, uint8 [n, h, w] in {0, 1}.
      is_object: False for a texture.
      seen: seen anomalous images, uint8 [m, h, w, 3].
      seen_mask: uint8 [m, h, w] in {0, 1}.
      seen_defect: their defects' names.
      roi: where anomalies may be, uint8 [h, w] in {0, 1}; None: everywhere.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        normal: np.ndarray,
        foreground: np.ndarray,
        is_object: bool,
        seen: np.ndarray,
        seen_mask: np.ndarray,
        seen_defect: Sequence[str],
        roi: np.ndarray | None = None,
    ):
        self._config = config.synthesis
        self._seed = config.seed
        size = tuple(config.image_size)
        self._shape = normal.shape[1:]
        # Large arrays are not copied into TensorFlow's memory, where reading them is faster.
        self._arrays = {
            name: tf.constant(array) if array.nbytes < disk.LARGE else array
            for name, array in (("normal", normal), ("foreground", foreground))
        }
        self._points = tf.constant(foreground_points(foreground))
        self._has_seen = len(seen) > 0
        self._seen = tf.constant(seen), tf.constant(seen_mask)
        self.textures = load_textures(
            config.synthesis.textures,
            size,
            config.synthesis.max_textures,
            data_dir=config.data.data_dir,
            exclude=config.category,
        )
        # On a grey product colour alone would give an anomaly away.
        grey = is_grey(normal)
        if grey:
            self.textures = to_grey(self.textures).numpy()
        self._simulate = Simulate(
            size, tf.constant(self.textures), config.synthesis, is_object, grey
        )
        if self._has_seen:
            self._extend = Extend(seen, seen_mask, seen_defect, config.synthesis, grey)
        self._min_pixels = max(1, round(config.synthesis.min_area * size[0] * size[1]))
        self._roi = tf.constant(np.ones(size) if roi is None else roi, tf.uint8)
        self._roughness = tf.constant(roughness(normal, foreground))
        self._turns = free_turns(normal, roi) if config.synthesis.turns else []
        if len(self._turns) > 1:
            logging.info("samples lie in %d of 8 ways, as the normal images do", len(self._turns))
        elif self._turns:
            logging.info("samples lie in one way, as the normal images do: they have a pose")

    def __call__(
        self, kind: tf.Tensor, index: tf.Tensor, slot: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One sample.

        Args:
          kind: an index into `KINDS`, int32.
          index: of the seen image, else of the normal image it is based on, int64.
          slot: the slot's number, int64; the random numbers are its.

        Returns:
          The image, uint8 [h, w, 3], and its mask, uint8 [h, w] in {0, 1}.
        """
        # A long run's slot numbers outgrow 32 bits: both parts of them count.
        high, low = (tf.cast(x, tf.int32) for x in (slot // 2**31, slot % 2**31))
        seed = tf.random.experimental.stateless_fold_in(tf.stack([self._seed, high]), low)
        branches = [lambda: self._normal(index, seed)]
        if self._has_seen:
            # Defects too small for the image size leave nothing to paste.
            extended = self._extended if len(self._extend) else self._simulated
            branches += [lambda: self._seen_one(index, seed), lambda: extended(index, seed)]
        else:
            branches += [lambda: self._simulated(index, seed)] * 2
        branches.append(lambda: self._simulated(index, seed))
        image, mask = tf.switch_case(kind, branches)
        if len(self._turns) > 1:
            which = Draws(tf.random.experimental.stateless_fold_in(seed, _TURN)).integer(
                len(self._turns)
            )
            image = turn(image, self._turns, which)
            mask = turn(mask[..., None], self._turns, which)[..., 0]
        return tf.ensure_shape(image, self._shape), tf.ensure_shape(mask, self._shape[:2])

    def _row(self, name, index):
        """One of the arrays' rows."""
        array = self._arrays[name]
        if isinstance(array, tf.Tensor):
            return array[index]
        # TensorFlow never lets go of a function that it calls: by a weak reference it does not hold
        # the arrays.
        maker, dtype, shape = weakref.ref(self), array.dtype, array.shape[1:]
        row = tf.numpy_function(lambda i: maker()._arrays[name][i], [index], dtype, stateful=False)
        return tf.ensure_shape(row, shape)

    def _normal(self, index, seed):
        image = self._row("normal", index)
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
            return bright, tf.cast(both[..., 3] >= 128, tf.uint8) * self._roi

        return tf.cond(draws.chance(probability), change, lambda: (image, mask))

    def _extended(self, index, seed):
        normal = self._row("normal", index)
        image, mask = self._extend(
            normal,
            self._row("foreground", index) > 0,
            self._points[index],
            Draws(seed),
        )
        return self._finished(normal, image, mask, index, seed)

    def _simulated(self, index, seed):
        # Where the image is rough by itself, an anomaly must stand out from that.
        contrast = self._config.simulated_contrast * self._roughness[index]
        normal = self._row("normal", index)
        image, mask = self._simulate(normal, self._row("foreground", index) > 0, contrast, seed)
        return self._finished(normal, image, mask, index, seed)

    def _finished(self, normal, image, mask, index, seed):
        """The sample, or a square where nothing showed; softened, as far as that is asked for."""
        image, mask = tf.cond(
            tf.reduce_any(mask),
            lambda: (image, mask),
            lambda: self._square(normal, self._points[index], Draws(seed)),
        )
        return soften(normal, image, self._config.softness), tf.cast(mask, tf.uint8)

    def _square(self, normal, points, draws):
        """What is left when every attempt failed: a square of other grey values, always seen."""
        height, width = normal.shape[:2]
        middle = points[draws.integer(tf.shape(points)[0])]
        reach = tf.cast(tf.math.ceil(tf.sqrt(float(self._min_pixels))), tf.float32)
        rows = tf.abs(tf.range(height, dtype=tf.float32) - middle[0]) <= reach
        columns = tf.abs(tf.range(width, dtype=tf.float32) - middle[1]) <= reach
        mask = rows[:, None] & columns[None] & (self._roi > 0)
        # Modulo 256: each value moves by 128.
        other = normal + tf.constant(128, tf.uint8)
        return blend(normal, other, mask, tf.constant(1.0)), mask
