"""What the fields of a configuration may be."""

import pytest

from configs import default
from prn_jax import program
from prn_jax.errors import UserError
from prn_jax.fields import checked


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_size": (100, 128)}, r"image_size=\(100, 128\): .* a multiple of 32"),
        ({"batch_size": 0}, "batch_size=0: give a number greater than 0"),
        ({"tiles": (0, 2)}, r"tiles=\(0, 2\): give \(rows, columns\)"),
        ({"tiles": (2, 2), "tile_overlap": 129}, "tile_overlap=129: give 0 to 128 pixels"),
        ({"tiles": (1, 2), "tile_overlap": -1}, "tile_overlap=-1: give 0 to 128"),
        ({"optimizer.warmup": 1.0}, "optimizer.warmup=1.0: give a share from 0 to below 1"),
        ({"thresholds.false_alarms": (0.0,)}, "thresholds.false_alarms=.*between 0 and 1"),
        ({"data.holdout": 1.0}, "data.holdout=1.0: give a share from 0 to below 1"),
        ({"num_seen": -1}, "num_seen=-1: give 0 or more"),
        ({"split_seed": -1}, "split_seed=-1: give 0 to"),
        ({"seed": 2**31}, "seed=2147483648: give 0 to 2147483647"),
        ({"optimizer.clip": -1.0}, "optimizer.clip=-1.0: give 0 or more"),
        ({"optimizer.average": 1.0}, "optimizer.average=1.0: give a share"),
        ({"optimizer.learning_rate": float("nan")}, "learning_rate=nan: give a number"),
        ({"attention.layers": -1}, "attention.layers=-1: give 0 or more"),
        ({"loss.focal_alpha": 2.0}, "loss.focal_alpha=2.0: give a share"),
        ({"prototypes.ratio": 1.5}, "prototypes.ratio=1.5: give a share"),
        ({"total_steps": -2}, "total_steps=-2: give -1, 0 or more"),
        ({"total_steps": 0, "memory.window": 3}, "memory.window=3 has no place in total_steps=0"),
        ({"total_steps": 0, "patch_map.weight": 1}, "patch_map.weight=1.0 has no place in total_"),
        ({"patch_map.weight": -1}, "patch_map.weight=-1.0: give 0 or more"),
        ({"patch_map.patches": 0}, "patch_map.patches=0: give 1 or more"),
        ({"sampling.normal": 0.0}, "sampling.normal=0.0: epochs are passes over normal images"),
        (
            {"sampling.normal": 0.9},
            r"sampling \(.*normal=0.9.*\): give shares of 0 or more that sum",
        ),
        ({"sampling.normal": 0.75, "sampling.seen": -0.125}, "sampling .*: give shares"),
        (
            {"prototypes.enabled": False, "memory.patches": 8, "memory.scales": (2, 3)},
            r"memory.scales=\(2, 3\): without prototypes",
        ),
        ({"attention.scales": (4,)}, r"attention.scales=\(4,\): give some of 1, 2, 3"),
        ({"attention.divisions": ()}, "attention.divisions=.*: give whole numbers"),
        ({"decoder.stride": 3}, "decoder.stride=3: give 1, 2 or 4"),
        ({"decoder.stride": 4, "decoder.stem": True}, "decoder.stem=True has no place"),
        ({"dtype": "float16"}, "dtype='float16': give auto, float32 or bfloat16"),
        ({"synthesis.max_textures": 0}, "synthesis.max_textures=0: give 1 or more"),
        ({"synthesis.shuffle_grid": 0}, "synthesis.shuffle_grid=0: give 1 or more"),
        ({"synthesis.self_source": 2.0}, "synthesis.self_source=2.0: give a share from 0 to 1"),
        ({"synthesis.softness": -1.0}, "synthesis.softness=-1.0: give 0 or more"),
        ({"synthesis.extended_scale": (1.5, 0.5)}, "extended_scale=.*: give the least and the"),
        ({"synthesis.simulated_opacity": (0.5, 2.0)}, "_opacity=.*at most 1"),
        ({"category": ""}, "category is empty: give a name, or"),
        ({"eval_every": -3}, "eval_every=-3: give 0 or more"),
        ({"checkpoint.every_minutes": float("nan")}, "every_minutes=nan: give 0 or more"),
    ],
)
def test_a_field_out_of_its_range_is_named(given, message):
    config = default.get_config().unlock()
    config.update_from_flattened_dict(given)
    with pytest.raises(UserError, match=message):
        checked(config)


@pytest.mark.parametrize("name", program.config_names())
def test_every_configuration_passes(name):
    config = __import__(f"configs.{name}", fromlist=["get_config"]).get_config()
    before = config.to_json()
    checked(config)
    assert config.to_json() == before
