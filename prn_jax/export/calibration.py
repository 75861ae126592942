"""Images by which the ranges of an 8-bit network are found: as training sees them."""

import numpy as np
from ml_collections import ConfigDict

from prn_jax.predict import Detector
from prn_jax.tiles import Tiling

_COUNT = 64


def sample(detector: Detector, manual_dir: str = "") -> np.ndarray:
    """Normal and synthesised images, in the shares of the detector's own training.

    Args:
      detector: from `prn_jax.load`; its configuration says which data and how anomalies are made.
      manual_dir: where the raw files are now; default: where they were.

    Returns:
      uint8 [64, h, w, 3], the first of the training's plan; with tiles, 64 whole images, each laid
      together from such samples.

    Raises:
      UserError: the data, or the textures, are no longer there or have another white.
    """
    from prn_jax import input_pipeline

    config = ConfigDict(detector.config)
    tiling = Tiling.of(config)
    with config.unlocked():
        config.batch_size = _COUNT * tiling.count
        if manual_dir:
            config.data.manual_dir = manual_dir
    data = input_pipeline.load_category(config, config.category)
    detector.identity.check_white(
        data.white_level,
        f"{config.data.name} {config.category} has changed since the training",
        "Put the images back, or name their folder by --manual_dir",
    )
    samples = next(iter(input_pipeline.train_batches(config, data, total_steps=1)))["image"]
    return tiling.blend(samples.astype(np.float32)).round().astype(np.uint8)
