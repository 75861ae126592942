"""What training would see: one contact sheet of normals, foregrounds, textures and anomalies."""

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image

from prn_jax import pictures
from prn_jax.input_pipeline import CategoryData, in_tiles, sample_maker
from prn_jax.synthesis.foreground import describe
from prn_jax.synthesis.samples import EXTENDED, KINDS, SEEN, SIMULATED
from prn_jax.synthesis.textures import spread


def samples_sheet(config: ConfigDict, data: CategoryData, columns: int = 8) -> Image.Image:
    """Draws what training makes of one category; the same seed draws the same samples.

    Args:
      config: see configs/default.py.
      data: from `input_pipeline.load_category`.
      columns: images per row.

    Returns:
      Rows of normal images, their foregrounds (dimmed outside), textures, then of seen, extended
      and simulated anomalies, each without and with the outline of its mask; all of tiles, where
      `config.tiles` says so.
    """
    data = in_tiles(config, data)
    maker = sample_maker(config, data)
    normal = spread(len(data.train), columns)
    rows = [
        ("normal", [(data.train.image[i], data.train.id[i].split("/")[-1]) for i in normal]),
        (
            f"foreground: {describe(data.foreground, data.is_object)}",
            [(_dim(data.train.image[i], data.foreground[i]), "") for i in normal],
        ),
        (
            f"textures: {len(maker.textures)}",
            [(maker.textures[i], "") for i in spread(len(maker.textures), columns)],
        ),
    ]  # fmt: skip
    seen, make = spread(len(data.seen), columns), tf.function(maker, autograph=False)
    for kind in (SEEN, EXTENDED, SIMULATED):
        if kind != SIMULATED and not len(data.seen):
            continue
        plain, outlined = [], []
        for number in range(len(seen) if kind == SEEN else columns):
            if kind == SEEN:
                index = seen[number]
                caption = data.seen.id[index].split("/", 1)[-1]
            else:
                index, caption = normal[number % len(normal)], ""
            image, mask = (
                x.numpy()
                for x in make(tf.constant(kind), tf.constant(index, tf.int64),
                              tf.constant(number, tf.int64))
            )  # fmt: skip
            plain.append((image, caption))
            share = f"{mask.mean():.1%}"
            outlined.append((pictures.outline(image, mask), share))
        rows.append((KINDS[kind], plain))
        rows.append((f"{KINDS[kind]}, its mask outlined: its share of the image", outlined))
    return pictures.contact_sheet(rows, cell=200)


def _dim(image: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    return np.where(foreground[..., None] > 0, image, image // 4)
