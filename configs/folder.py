r"""Your own images, in the layout of docs/datasets.md.

python launch/main.py --config=configs/folder.py --config.data.manual_dir=/path/to/images \
    --workdir=runs/bolts
"""

from ml_collections import ConfigDict

from prn_jax.configs import mvtec_plus


def get_config() -> ConfigDict:
    """Returns `mvtec_plus` with your folder; without defects, add --config.num_seen=0."""
    config = mvtec_plus.get_config()
    config.data.name = "folder"
    config.data.manual_dir = "~/data/my_products"
    # 99 images held out promise at most 1 % false alarms; of fewer, the promise is weaker.
    config.data.holdout = 0.1
    # As measured (docs/experiments_plus.md, 33); a step at 256x256 takes 2.6 GB on a CPU. More
    # steps did not help there (docs/experiments.md, 21), and 700 epochs of a thousand images would
    # be 90,000.
    config.batch_size = 16
    config.total_steps = 1000
    return config
