"""KolektorSDD2, at about its own proportions. The seen anomalies come from the training part."""

from ml_collections import ConfigDict

from prn_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the default with KolektorSDD2's folder and image size, and half of the batch."""
    config = default.get_config()
    config.data.name = "kolektor_sdd2"
    config.data.manual_dir = "~/data/KolektorSDD2"
    # Its images are about 630 high and 230 wide. Ours; the paper's size is probably 256x256.
    config.image_size = (640, 224)
    # 2.2 times the pixels of 256x256.
    config.batch_size = 32
    return config
