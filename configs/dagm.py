"""DAGM 2007, ten classes. The seen anomalies are drawn from the training part's defects."""

from ml_collections import ConfigDict

from prn_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the default with DAGM's folder."""
    config = default.get_config()
    config.data.name = "dagm2007"
    config.data.manual_dir = "~/data/dagm2007"
    return config
