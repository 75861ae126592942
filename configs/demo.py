"""The demo: defects drawn on a photograph of gravel. No data set, no model hub, no GPU."""

from ml_collections import ConfigDict

from prn_jax.configs import default


def get_config() -> ConfigDict:
    """Returns a small run whose weights come from a package (Apache-2.0) instead of a hub."""
    config = default.get_config()
    config.data.name = "demo"
    config.category = "gravel"
    config.image_size = (128, 128)
    config.backbone.name = "efficientnet_lite0"
    config.batch_size = 16
    config.total_steps = 300
    return config
