"""What the fields of a configuration may be: refused before anything is computed."""

import functools
from collections.abc import Sequence

from ml_collections import ConfigDict

from prn_jax.errors import UserError, normal_form

# Fields, what each must be by itself, and how that is said. NaN is nothing of it.
_RANGES = (
    (
        (
            "batch_size",
            "checkpoint.keep",
            "decoder.width",
            "epochs",
            "eval_batch_size",
            "log_every",
            "optimizer.learning_rate",
            "prototypes.iterations",
            "prototypes.max_images",
            "score_pixels",
        ),
        lambda x: x > 0,
        "a number greater than 0",
    ),
    (
        (
            "attention.layers",
            "checkpoint.every_minutes",
            "checkpoint.every_steps",
            "eval_every",
            "loss.dice_weight",
            "loss.focal_gamma",
            "loss.focal_weight",
            "memory.patches",
            "num_seen",
            "optimizer.clip",
            "optimizer.weight_decay",
            "patch_map.weight",
            "profile.first_step",
            "synthesis.min_area",
            "synthesis.operations",
            "synthesis.perlin_max_exponent",
            "synthesis.shift",
            "synthesis.simulated_contrast",
            "synthesis.softness",
            "synthesis.visible_change",
        ),
        lambda x: x >= 0,
        "0 or more",
    ),
    (
        # Without one of these there is nothing to paste, or to be near to.
        (
            "patch_map.patches",
            "synthesis.attempts",
            "synthesis.max_pastes",
            "synthesis.max_textures",
            "synthesis.shuffle_grid",
        ),
        lambda x: x >= 1,
        "1 or more",
    ),
    (
        (
            "loss.focal_alpha",
            "score_distance",  # more would be a power beyond all numbers
            "synthesis.augment_normal",
            "synthesis.augment_seen",
            "synthesis.extended_colour",
            "synthesis.extended_opaque",
            "synthesis.extended_spatial",
            "synthesis.extended_together",
            "synthesis.self_source",
            "synthesis.visible_share",
        ),
        lambda x: 0 <= x <= 1,
        "a share from 0 to 1",
    ),
    (
        ("data.holdout", "optimizer.average", "optimizer.warmup"),
        lambda x: 0 <= x < 1,
        "a share from 0 to below 1",
    ),
    (("prototypes.ratio",), lambda x: 0 < x <= 1, "a share, 1 at most"),
    (
        ("synthesis.extended_scale",),
        lambda x: len(x) == 2 and 0 < x[0] <= x[1],
        "the least and the most, greater than 0",
    ),
    (
        ("synthesis.extended_opacity", "synthesis.simulated_opacity"),
        lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1,
        "the least and the most, greater than 0 and at most 1",
    ),
    # TensorFlow's draws take 31 bits of a seed, NumPy's 32.
    (("seed",), lambda x: 0 <= x < 2**31, f"0 to {2**31 - 1}"),
    (("split_seed",), lambda x: 0 <= x < 2**32, f"0 to {2**32 - 1}"),
    (("total_steps",), lambda x: x >= -1, "-1, 0 or more"),
    (("decoder.stride",), lambda x: x in (1, 2, 4), "1, 2 or 4"),
    (("memory.window",), lambda x: x == 0 or (x > 0 and x % 2), "0 or an odd number of places"),
    (
        ("thresholds.false_alarms",),
        lambda x: all(0 < rate < 1 for rate in x),
        "shares between 0 and 1",
    ),
    (
        ("attention.divisions",),
        lambda x: x and all(isinstance(n, int) and n >= 1 for n in x),
        "whole numbers >= 1",
    ),
)


def checked(config: ConfigDict) -> ConfigDict:
    """A copy of the configuration whose fields are known to make sense.

    Raises:
      UserError: naming the field and what it should be.
    """
    config = config.copy_and_resolve_references()
    size = config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    size = size * 2 if len(size) == 1 else size
    if len(size) != 2 or any(not isinstance(x, int) or x < 32 or x % 32 for x in size):
        raise UserError(
            f"image_size={config.image_size}: give (height, width), each a multiple of 32"
        )
    with config.ignore_type(), config.unlocked():
        config.image_size = size
    config.category = normal_form(config.category)
    if not config.category:
        raise UserError('category is empty: give a name, or "all"')
    _check_tiles(config)
    for names, fits, mend in _RANGES:
        for name in names:
            value = functools.reduce(getattr, name.split("."), config)
            if not fits(value):
                raise UserError(f"{name}={value}: give {mend}")
    if config.total_steps == 0 and not config.memory.patches:
        config.memory.patches = 4096
    if config.total_steps < 0 and config.sampling.normal <= 0:
        raise UserError(
            f"sampling.normal={config.sampling.normal}: epochs are passes over normal images; give "
            "total_steps"
        )
    shares = config.sampling.to_dict()
    if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        given = ", ".join(f"{name}={value}" for name, value in shares.items())
        raise UserError(f"sampling ({given}): give shares of 0 or more that sum to 1")
    _check_some("memory.scales", config.memory.scales, (1, 2, 3))
    if config.total_steps and not (config.prototypes.enabled or spares_prototypes(config.memory)):
        raise UserError(
            f"memory.scales={tuple(config.memory.scales)}: without prototypes "
            "(prototypes.enabled=False) a network takes all scales or none; give (1,2,3), or "
            "memory.patches=0"
        )
    if config.total_steps == 0 and config.memory.window:
        raise UserError(
            f"memory.window={config.memory.window} has no place in total_steps=0, where the map is "
            "the distance to memory.patches: give 0"
        )
    if config.total_steps == 0 and config.patch_map.weight:
        raise UserError(
            f"patch_map.weight={config.patch_map.weight} has no place in total_steps=0, where the "
            "map of patches is all there is: give 0"
        )
    if config.backbone.merge not in ("auto", "mean", "max"):
        raise UserError(f"backbone.merge={config.backbone.merge!r}: give auto, mean or max")
    doublings, _ = looks(config)  # those of most pixels, where the images are to tell
    _check_some("backbone.doublings", doublings, (-2, -1, 0, 1, 2))
    multiple = 32 * 2 ** max(0, -min(doublings))
    if any(x % multiple for x in config.image_size):
        raise UserError(
            f"image_size={config.image_size}: backbone.doublings has {min(doublings)}, so it is "
            f"halved: give multiples of {multiple}"
        )
    if config.decoder.stem and config.decoder.stride == 4:
        raise UserError("decoder.stem=True has no place in decoder.stride=4: give 1 or 2")
    _check_some("attention.scales", config.attention.scales, (1, 2, 3))
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"dtype={config.dtype!r}: give auto, float32 or bfloat16")
    return config


def looks(config: ConfigDict, posed: bool = True) -> tuple[tuple[int, ...], str]:
    """`backbone.doublings` and `backbone.merge`, of an earlier version too; settles what is open.

    Args:
      config: whose `image_size` is (height, width).
      posed: whether the product always lies alike; what does not is looked at once from 256 pixels
        on (docs/experiments_plus.md, 39).
    """
    large = min(config.image_size) >= 256
    doublings = tuple(config.backbone.get("doublings", (0,)))
    if not doublings and large:
        doublings = (-1, 0) if posed else (0,)
    merge = config.backbone.get("merge", "mean")
    if merge == "auto":
        merge = "max" if large else "mean"
    return doublings or (0, 1), merge  # one of 64 pixels is too coarse


def _check_tiles(config: ConfigDict) -> None:
    """Makes `tiles` a pair, and checks both fields."""
    tiles, overlap = config.tiles, config.tile_overlap
    tiles = (tiles, tiles) if isinstance(tiles, int) else tuple(tiles)
    tiles = tiles * 2 if len(tiles) == 1 else tiles
    if len(tiles) != 2 or any(not isinstance(x, int) or x < 1 for x in tiles):
        raise UserError(f"tiles={config.tiles}: give (rows, columns), each 1 or more")
    with config.ignore_type(), config.unlocked():
        config.tiles = tiles
    cut = [side for side, count in zip(config.image_size, tiles) if count > 1]
    if cut and not 0 <= overlap <= min(cut) // 2:
        raise UserError(
            f"tile_overlap={overlap}: give 0 to {min(cut) // 2} pixels, half of a tile "
            f"(image_size={config.image_size})"
        )


def _check_some(field: str, values: Sequence[int], choices: tuple[int, ...]) -> None:
    whole = all(type(x) is int for x in values)  # 1.0 and True equal 1, but count nothing
    if not values or not whole or not set(values) <= {*choices} or len(set(values)) < len(values):
        names = ", ".join(map(str, choices))
        raise UserError(f"{field}={tuple(values)}: give some of {names}, each once")


def spares_prototypes(memory: ConfigDict) -> bool:
    """Whether a network without prototypes has residuals of all scales or of none, as it must."""
    return not memory.patches or bool(memory.window) or len(memory.scales) == 3
