"""BeanTech AD, three products, all resized to a square as is usual (03 is 800x600)."""

from ml_collections import ConfigDict

from prn_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the default with BeanTech AD's folder."""
    config = default.get_config()
    config.data.name = "btad"
    config.data.manual_dir = "~/data/BTech_Dataset_transformed"
    return config
