"""MVTec AD, every category that is found: the paper's network, its size, 10 seen anomalies.

What of it is the paper's and what is ours: docs/reproducing.md.
"""

from ml_collections import ConfigDict

from prn_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the default, which is MVTec AD's."""
    return default.get_config()
