"""Photometric and geometric operations on uint8 images, with random draws of their strengths.

The ten of DRAEM (which DiffusionAD, by PRN's first author, keeps): gamma, brightness, sharpness,
hue and saturation, solarize, posterize, invert, autocontrast, equalize, rotation. Seven of them
map each grey value to another, so that any number of these costs one lookup per pixel.
"""

import math

import tensorflow as tf

GREYS = tf.range(256.0)
# RGB -> luminance and two chroma axes (NTSC's YIQ): hue is a rotation of the last two.
_YIQ = tf.constant(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], tf.float32
)


class Draws:
    """A sample's random numbers: one stateless draw, handed out one after another.

    The same seed gives the same numbers, wherever and whenever the sample is made.
    """

    def __init__(self, seed: tf.Tensor, count: int = 64):
        self._seed = seed
        self._numbers = tf.random.stateless_uniform([count], seed)
        self._used = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> tf.Tensor:
        """A number in [low, high)."""
        return low + (high - low) * self.vector(1)[0]

    def vector(self, count: int) -> tf.Tensor:
        """`count` numbers in [0, 1)."""
        start, self._used = self._used, self._used + count
        if self._used > self._numbers.shape[0]:
            raise ValueError("a sample wants more random numbers than were drawn")
        return self._numbers[start : self._used]

    def integer(self, count: int | tf.Tensor) -> tf.Tensor:
        """An integer in [0, count), int32."""
        count = tf.cast(count, tf.int32)
        return tf.minimum(tf.cast(self.uniform() * tf.cast(count, tf.float32), tf.int32), count - 1)

    def chance(self, probability: float) -> tf.Tensor:
        """True with the given probability."""
        return self.uniform() < probability

    def seed(self, number: int | tf.Tensor) -> tf.Tensor:
        """A seed of its own, int32 [2], for what needs many numbers."""
        number = tf.cast(number, tf.int32) + 0x5EED
        return tf.random.experimental.stateless_fold_in(self._seed, number)


def some_of_ten(image: tf.Tensor, draws: Draws, count: int) -> tf.Tensor:
    """Applies `count` of the ten operations, drawn without replacement.

    Args:
      image: uint8 [h, w, 3].
      draws: random numbers.
      count: how many.

    Returns:
      uint8 [h, w, 3].
    """
    rank = tf.argsort(tf.argsort(draws.vector(10)))
    use = [rank[i] < count for i in range(10)]
    strength = draws.vector(16)
    table = _lookup_table(image, use[:7], strength)
    image = tf.cond(tf.reduce_any(use[:7]), lambda: _look_up(image, table), lambda: image)
    angle = (strength[11] - 0.5) * math.pi / 2
    image = tf.cond(
        use[7], lambda: hue_saturation(image, strength[12], strength[13]), lambda: image
    )
    image = tf.cond(use[8], lambda: sharpen(image, strength[14]), lambda: image)
    return tf.cond(use[9], lambda: rotate(image, angle), lambda: image)


def brightness(image: tf.Tensor, gain: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
    """`gain * image + offset`, uint8 [h, w, 3], one lookup per pixel."""
    table = _to_grey(GREYS * gain + offset)
    return tf.gather(tf.cast(table, tf.uint8), tf.cast(image, tf.int32))


def hue_saturation(image: tf.Tensor, hue: tf.Tensor, saturation: tf.Tensor) -> tf.Tensor:
    """Turns hue by up to +-70 degrees and scales saturation by 0.5 to 1.5.

    DRAEM adds up to +-50 of 255 to both; 50 of 255 of the hue circle are 70 degrees.

    Args:
      image: uint8 [h, w, 3].
      hue: in [0, 1], 0.5 leaves it.
      saturation: in [0, 1], 0.5 leaves it.
    """
    angle = (hue - 0.5) * 2.0 * math.radians(70.0)
    scale = 0.5 + saturation
    cos, sin = scale * tf.cos(angle), scale * tf.sin(angle)
    turn = tf.stack([[1.0, 0.0, 0.0], tf.stack([0.0, cos, -sin]), tf.stack([0.0, sin, cos])])
    matrix = tf.linalg.inv(_YIQ) @ turn @ _YIQ
    shape = tf.shape(image)
    flat = tf.matmul(tf.reshape(tf.cast(image, tf.float32), [-1, 3]), matrix, transpose_b=True)
    return tf.reshape(tf.saturate_cast(tf.round(flat), tf.uint8), shape)


def sharpen(image: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
    """Pillow's sharpness by a factor of 0 (smooth) to 2, as DRAEM's: 0.5 leaves the image.

    Args:
      image: uint8 [h, w, 3].
      strength: in [0, 1].
    """
    x = tf.cast(image, tf.float32)
    mean = tf.nn.avg_pool2d(x[None], 3, 1, "SAME")[0]
    # Its smooth image counts the middle of nine five times.
    detail = 9.0 / 13.0 * (x - mean)
    return tf.saturate_cast(tf.round(x + (2.0 * strength - 1.0) * detail), tf.uint8)


def rotate(image: tf.Tensor, angle: tf.Tensor) -> tf.Tensor:
    """Turns [h, w, c] of any type about its middle by `angle` radians, mirrored at the edges."""
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    middle = (size - 1.0) / 2.0
    return warp(image, angle, 1.0, middle, middle, mirror=True)


def warp(
    image: tf.Tensor,
    angle: tf.Tensor,
    scale: tf.Tensor,
    source: tf.Tensor,
    target: tf.Tensor,
    flip: tf.Tensor | float = 1.0,
    mirror: bool = False,
) -> tf.Tensor:
    """Turns and scales about the pixel `source` and moves that to the pixel `target`.

    Args:
      image: [h, w, c], uint8 or float32.
      angle: radians, clockwise as the image is seen.
      scale: above 1 enlarges.
      source: (row, column), float32 [2].
      target: (row, column), float32 [2].
      flip: -1 mirrors left and right before turning, 1 does not.
      mirror: what lies outside is the image mirrored, else 0.

    Returns:
      [h, w, c] of the same type, bilinear; uint8 is rounded.
    """
    # The op wants the map from output to input: x_in = a0 x + a1 y + a2, y_in = b0 x + b1 y + b2.
    cos, sin = tf.cos(angle) / scale, tf.sin(angle) / scale
    a0, a1, b0, b1 = flip * cos, flip * sin, -sin, cos
    a2 = source[1] - a0 * target[1] - a1 * target[0]
    b2 = source[0] - b0 * target[1] - b1 * target[0]
    transform = tf.stack([a0, a1, a2, b0, b1, b2, 0.0, 0.0])
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(image, tf.float32)[None],  # of uint8 it would cut values off
        transforms=transform[None],
        output_shape=tf.shape(image)[:2],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="REFLECT" if mirror else "CONSTANT",
    )[0]
    return tf.cast(tf.round(moved), image.dtype) if image.dtype.is_integer else moved


def _lookup_table(image: tf.Tensor, use: list[tf.Tensor], strength: tf.Tensor) -> tf.Tensor:
    """The seven grey-value operations that are in use, composed: float32 [3, 256]."""
    # Every fourth pixel tells a histogram well enough.
    sample = tf.cast(tf.reshape(image[::4, ::4], [-1, 3]), tf.int32)
    columns = sample + 256 * tf.range(3)
    counts = tf.math.bincount(tf.reshape(columns, [-1]), minlength=768, maxlength=768)
    counts = tf.cast(tf.reshape(counts, [3, 256]), tf.float32)
    table = tf.tile(GREYS[None], [3, 1])

    def gamma(table):
        exponent = tf.exp((strength[0:3, None] - 0.5) * 2.0 * math.log(2.0))  # 0.5 to 2
        return 255.0 * (table / 255.0) ** exponent

    def bright(table):
        return table * (0.8 + 0.4 * strength[3]) + 60.0 * (strength[4] - 0.5)

    def solarize(table):
        # DRAEM's acts half the time that it is drawn.
        threshold = 32.0 + 96.0 * strength[5]
        return tf.where((table >= threshold) & (strength[7] >= 0.5), 255.0 - table, table)

    def posterize(table):
        step = 2.0 ** tf.floor(1.0 + 5.0 * strength[6])  # 7 down to 3 bits
        return tf.floor(table / step) * step

    def invert(table):
        return 255.0 - table

    def autocontrast(table):
        present = counts > 0
        low = tf.reduce_min(tf.where(present, table, 255.0), axis=1, keepdims=True)
        high = tf.reduce_max(tf.where(present, table, 0.0), axis=1, keepdims=True)
        return (table - low) * 255.0 / tf.maximum(high - low, 1.0)

    def equalize(table):
        order = tf.cast(_to_grey(table), tf.int32) + 256 * tf.range(3)[:, None]
        now = tf.math.unsorted_segment_sum(tf.reshape(counts, [-1]), tf.reshape(order, [-1]), 768)
        rank = tf.cumsum(tf.reshape(now, [3, 256]), axis=1)
        rank = 255.0 * rank / tf.maximum(rank[:, -1:], 1.0)
        return tf.reshape(tf.gather(tf.reshape(rank, [-1]), order), [3, 256])

    steps = (gamma, bright, solarize, posterize, invert, autocontrast, equalize)
    for chosen, step in zip(use, steps):
        table = tf.cond(chosen, lambda t=table, f=step: _to_grey(f(t)), lambda t=table: t)
    return table


def _to_grey(table: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(tf.round(table), 0.0, 255.0)


def _look_up(image: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    """Maps each channel of uint8 [h, w, 3] through its row of float32 [3, 256]."""
    index = tf.cast(image, tf.int32) + 256 * tf.range(3)
    return tf.gather(tf.reshape(tf.cast(table, tf.uint8), [-1]), index)
