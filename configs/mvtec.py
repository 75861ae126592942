"""MVTec AD, every category that is found, as the paper trains it: 256x256, 10 seen anomalies."""

from ml_collections import ConfigDict

from prn_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the default, which is MVTec AD's."""
    return default.get_config()
