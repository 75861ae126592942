r"""For CPUs without an accelerator, and lines that do not wait: MVTec AD, or your own images.

python launch/main.py --config=configs/fast.py --config.data.name=folder \
    --config.data.manual_dir=/path/to/images --config.data.holdout=0.1 \
    --config.batch_size=16 --config.total_steps=1000 --workdir=runs/bolts
"""

from ml_collections import ConfigDict

from prn_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the default with a smaller network; docs/benchmarks.md has its price."""
    config = default.get_config()
    config.backbone.name = "efficientnet_lite0"
    config.attention.layers = 1
    config.attention.scales = (2, 3)
    # One layer does without (docs/experiments.md, 43).
    config.attention.norm = False
    config.decoder.width = 0.5
    config.decoder.stride = 4
    # A smaller network learns faster (docs/experiments_fast.md, 11), and needs no clipping (26).
    config.optimizer.learning_rate = 2e-3
    config.optimizer.clip = 0.0
    return config
