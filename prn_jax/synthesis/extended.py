"""Extended anomalies: regions of the seen defects, moved to other places of normal images.

The paper enlarges the few seen anomalies by placing their anomalous regions on normal images after
random spatial transformations. A piece is one connected region of a seen mask, or all of them as
they lie; it is turned, scaled, flipped, recoloured and laid on the foreground.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict
from scipy import ndimage

from prn_jax.synthesis import augment
from prn_jax.synthesis.augment import Draws
from prn_jax.synthesis.blending import blend, count, difference, to_grey


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What can be moved, ordered by defect type and image.

    Attributes:
      types: the first image of each type, and the number of images, int [t + 1].
      images: the first piece of each image, and the number of pieces, int [m + 1]. An image's first
        piece is its whole mask; its connected regions follow where there are several.
      number: which of the given images a piece is of, int [r].
      part: which of that image's labels a piece is, int [r]; 0: all of them.
      labels: of each given image's connected regions, from 1 on, int32 [n, h, w].
      centre: the middle of its bounding box, (row, column), whole pixels, float32 [r, 2].
    """

    types: np.ndarray
    images: np.ndarray
    number: np.ndarray
    part: np.ndarray
    labels: np.ndarray
    centre: np.ndarray

    def __len__(self) -> int:
        return len(self.number)


class Extend:
    """Makes extended anomalies out of seen ones.

    Args:
      images: seen anomalous images, uint8 [n, h, w, 3].
      masks: uint8 [n, h, w] in {0, 1}.
      defects: the types of their defects.
      config: `config.synthesis`.
      grey: whether everything that is pasted is grey, as the product is.
    """

    def __init__(
        self,
        images: np.ndarray,
        masks: np.ndarray,
        defects: Sequence[str],
        config: ConfigDict,
        grey: bool = False,
    ):
        self._config, self._grey = config, grey
        pieces = cut_pieces(masks, defects, config.min_region)
        self._count = len(pieces)
        self._images = tf.constant(images)
        self._types, self._first, self._numbers, self._parts = (
            tf.constant(x, tf.int32)
            for x in (pieces.types, pieces.images, pieces.number, pieces.part)
        )
        self._labels = tf.constant(pieces.labels)
        self._centres = tf.constant(pieces.centre)

    def __len__(self) -> int:
        """Pieces to choose from."""
        return self._count

    def __call__(
        self, image: tf.Tensor, foreground: tf.Tensor, points: tf.Tensor, draws: Draws
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Lays pieces on an image; one that does not show is drawn anew.

        Args:
          image: a normal image, uint8 [h, w, 3].
          foreground: where the product is, bool [h, w].
          points: some pixels of the foreground, float32 [m, 2] (row, column).
          draws: random numbers.

        Returns:
          The image with anomalies, uint8 [h, w, 3], and where they are, bool [h, w]: nowhere when
          no piece showed. Outside of it the image is the normal one.
        """
        config, normal = self._config, image
        pastes = 1 + draws.integer(config.max_pastes)

        def attempt(number, pasted, image, mask):
            made, region = self._paste(image, foreground, points, Draws(draws.seed(number), 16))
            # Neither what was pasted before nor what looks normal again counts.
            change = tf.minimum(difference(normal, made), difference(image, made))
            visible = count(region & (change >= config.visible_change))
            # Real defects are as plain and as small as they are: no more is asked for.
            shows = (visible >= 1) & (visible >= config.visible_share * count(region))
            return (
                number + 1,
                pasted + tf.cast(shows, tf.int32),
                tf.where(shows, made, image),
                mask | (region & shows),
            )

        def wanting(number, pasted, image, mask):
            return (pasted < pastes) & (number - pasted < config.attempts)

        start = (tf.constant(0), tf.constant(0), image, tf.zeros_like(foreground))
        _, _, image, mask = tf.while_loop(wanting, attempt, start)
        return image, mask

    def _draw_piece(self, draws: Draws) -> tf.Tensor:
        """The type, an image of it, then the image's whole mask or one of its regions."""

        def among(first, number):
            return first[number] + draws.integer(first[number + 1] - first[number])

        image = among(self._types, draws.integer(self._types.shape[0] - 1))
        whole, end = self._first[image], self._first[image + 1]
        together = draws.chance(self._config.extended_together) | (end - whole == 1)
        region = whole + 1 + draws.integer(tf.maximum(end - whole - 1, 1))
        return tf.where(together, whole, region)

    def _paste(self, image, foreground, points, draws):
        config = self._config
        piece = self._draw_piece(draws)
        source = tf.gather(self._images, self._numbers[piece])
        labels, part = tf.gather(self._labels, self._numbers[piece]), self._parts[piece]
        region = tf.cast(tf.where(part == 0, labels > 0, labels == part), tf.uint8)[..., None] * 255
        point = tf.gather(points, draws.integer(tf.shape(points)[0]))
        spatial = draws.chance(config.extended_spatial)
        angle = tf.where(spatial, draws.uniform(0.0, 2.0 * math.pi), 0.0)
        scale = tf.where(spatial, draws.uniform(*config.extended_scale), 1.0)
        flip = tf.where(spatial & draws.chance(0.5), -1.0, 1.0)

        def place(x, mirror):
            return augment.warp(x, angle, scale, self._centres[piece], point, flip, mirror)

        # Beyond the seen image's edge there is no region, but no black either that fades into it.
        content = place(source, True)
        weight = tf.cast(place(region, False)[..., 0], tf.float32) / 255.0
        jitter = draws.chance(config.extended_colour)
        gain, offset = draws.uniform(0.8, 1.2), draws.uniform(-30.0, 30.0)
        content = tf.cond(
            jitter, lambda: augment.brightness(content, gain, offset), lambda: content
        )
        hue, saturation = draws.uniform(0.45, 0.55), draws.uniform()
        if self._grey:
            content = to_grey(content)
        else:
            content = tf.cond(
                jitter, lambda: augment.hue_saturation(content, hue, saturation), lambda: content
            )
        low, high = config.extended_opacity
        opacity = tf.where(draws.chance(config.extended_opaque), 1.0, draws.uniform(low, high))
        # What is pasted and what is marked is the same, on the foreground.
        region = (weight >= 0.5) & foreground
        return blend(image, content, tf.where(region, weight, 0.0), opacity), region


def cut_pieces(masks: np.ndarray, defects: Sequence[str], min_pixels: int) -> Pieces:
    """Cuts masks into their connected (8-connected) regions.

    Args:
      masks: uint8 [n, h, w] in {0, 1}; an empty one gives no piece.
      defects: the type of each.
      min_pixels: smaller regions are moved only together with the others.
    """
    types, images, number, part, centre = [], [], [], [], []
    labels = np.zeros(masks.shape, np.int32)
    marked = [i for i in range(len(masks)) if masks[i].any()]
    for i in sorted(marked, key=lambda i: defects[i]):
        if not number or defects[i] != defects[number[-1]]:
            types.append(len(images))
        images.append(len(number))
        found = ndimage.label(masks[i], np.ones((3, 3)), output=labels[i])
        sizes = np.bincount(labels[i].ravel(), minlength=found + 1)
        kept = [k for k in range(1, found + 1) if sizes[k] >= min_pixels] if found > 1 else []
        whole = ndimage.find_objects((labels[i] > 0).astype(int))
        bounds = ndimage.find_objects(labels[i])
        for bound in (*whole, *(bounds[k - 1] for k in kept)):
            centre.append([(axis.start + axis.stop - 1) // 2 for axis in bound])
        number += [i] * (1 + len(kept))
        part += [0, *kept]
    return Pieces(
        np.array([*types, len(images)]),
        np.array([*images, len(number)]),
        np.array(number, int),
        np.array(part, int),
        labels,
        np.array(centre, np.float32).reshape(-1, 2),
    )
