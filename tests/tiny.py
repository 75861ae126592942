"""A backbone of four convs, "tiny", which compiles in a moment.

`python -m tests.tiny PROGRAM FLAGS...` runs a program that knows it.
"""

import runpy
import sys

import flax.linen as nn

from configs import default
from prn_jax.models import backbone
from tests.trees import make_mvtec


class Tiny(nn.Module):
    """Features of four channels."""

    stages: int = 4
    train_stage4: bool = True
    return_stem: bool = False
    dtype: object = None

    @nn.compact
    def __call__(self, x):
        features = [x[:, ::2, ::2]] if self.return_stem else []
        names = ("one_conv", "two_conv", "three_conv", "four_conv")[: self.stages]
        for name, size in zip(names, (4, 2, 2, 2)):
            collection = "params" if name == "four_conv" else "backbone"
            x = backbone.Conv(4, 1, size, collection=collection, name=name)(x)
            features.append(x)
        return tuple(features)


# The fields of a network with it that has as few parts as one can have.
FIELDS = {
    "image_size": (64, 64),
    "backbone.name": "tiny",
    "backbone.weights": "random",
    "attention.layers": 0,
    "fusion.enabled": False,
    "prototypes.iterations": 2,
    "synthesis.max_textures": 10,
    "batch_size": 8,
}


def run_config(root, size, train, **fields):
    """The fields of a short run of such a network, on a bottle of random images in `root`."""
    register()
    make_mvtec(root / "raw", defects={"broken": 3}, train=train, size=size)
    config = default.get_config()
    config.data.manual_dir, config.data.data_dir = str(root / "raw"), str(root / "records")
    config.update_from_flattened_dict(FIELDS | {"category": "bottle", "num_seen": 1} | fields)
    return config


def register():
    """Makes it one of this process' backbones."""
    backbone.BACKBONES["tiny"] = backbone.BackboneSpec(Tiny, {}, (4, 4, 4, 4), "random")


if __name__ == "__main__":
    register()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
