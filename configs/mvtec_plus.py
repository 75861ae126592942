r"""MVTec AD, for accuracy before faithfulness (what it gains and loses: docs/experiments_plus.md).

python launch/main.py --config=configs/mvtec_plus.py --config.data.manual_dir=/data/mvtec_ad \
    --config.batch_size=16 --config.total_steps=1000 --workdir=runs/plus
"""

from ml_collections import ConfigDict

from prn_jax.configs import fast


def get_config() -> ConfigDict:
    """Returns the small network, which sees each image in two sizes, or turned."""
    config = fast.get_config()
    # Looks by the image's size (docs/experiments_plus.md, 33), and the normal images (39).
    config.backbone.doublings = ()
    config.backbone.merge = "auto"
    # Of products without a pose alone, as the normal images tell (docs/experiments_plus.md, 29).
    config.synthesis.turns = True
    config.average_turns = True
    return config
