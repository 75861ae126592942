"""What the fields of a configuration may be: refused before anything is computed."""

import unicodedata
from collections.abc import Sequence

from ml_collections import ConfigDict

from prn_jax.errors import UserError

# Fields of the synthesis, what they must be, and how that is said.
_SYNTHESIS = (
    # Without one of these there is nothing to paste.
    (("attempts", "max_pastes", "max_textures", "shuffle_grid"), lambda x: x >= 1, "1 or more"),
    (
        (
            "augment_normal",
            "augment_seen",
            "extended_colour",
            "extended_opaque",
            "extended_spatial",
            "extended_together",
            "self_source",
            "visible_share",
        ),
        lambda x: 0 <= x <= 1,
        "a share from 0 to 1",
    ),
    (
        ("extended_opacity", "extended_scale", "simulated_opacity"),
        lambda x: len(x) == 2 and 0 < x[0] <= x[1],
        "the least and the most, greater than 0",
    ),
    (
        (
            "min_area",
            "operations",
            "perlin_max_exponent",
            "shift",
            "simulated_contrast",
            "softness",
            "visible_change",
        ),
        lambda x: x >= 0,
        "0 or more",
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
    config.category = unicodedata.normalize("NFC", config.category)  # as a Mac does not write it
    _check_tiles(config)
    positive = {
        "batch_size": config.batch_size,
        "eval_batch_size": config.eval_batch_size,
        "epochs": config.epochs,
        "score_pixels": config.score_pixels,
        "log_every": config.log_every,
        "checkpoint.keep": config.checkpoint.keep,
        "prototypes.iterations": config.prototypes.iterations,
        "prototypes.max_images": config.prototypes.max_images,
        "optimizer.learning_rate": config.optimizer.learning_rate,
        "decoder.width": config.decoder.width,
    }
    for field, value in positive.items():
        if not value > 0:
            raise UserError(f"{field}={value}: give a number greater than 0")
    if config.total_steps < -1:
        raise UserError(f"total_steps={config.total_steps}: give -1, 0 or more")
    if config.total_steps == 0 and not config.memory.patches:
        config.memory.patches = 4096
    if config.total_steps < 0 and config.sampling.normal <= 0:
        raise UserError(
            f"sampling.normal={config.sampling.normal}: epochs are passes over normal images; give "
            "total_steps"
        )
    _check_memory(config.memory)
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
    _check_some("backbone.doublings", config.backbone.doublings, (0, 1, 2))
    if config.decoder.stride not in (1, 2, 4):
        raise UserError(f"decoder.stride={config.decoder.stride}: give 1, 2 or 4")
    if config.decoder.stem and config.decoder.stride == 4:
        raise UserError("decoder.stem=True has no place in decoder.stride=4: give 1 or 2")
    not_negative = {
        "attention.layers": config.attention.layers,
        "loss.dice_weight": config.loss.dice_weight,
        "loss.focal_gamma": config.loss.focal_gamma,
        "loss.focal_weight": config.loss.focal_weight,
        "optimizer.clip": config.optimizer.clip,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "num_seen": config.num_seen,
    }
    for field, value in not_negative.items():
        if not value >= 0:
            raise UserError(f"{field}={value}: give 0 or more")
    if not 0 < config.prototypes.ratio <= 1:
        raise UserError(f"prototypes.ratio={config.prototypes.ratio}: give a share, 1 at most")
    if not 0 <= config.loss.focal_alpha <= 1:
        raise UserError(f"loss.focal_alpha={config.loss.focal_alpha}: give a share from 0 to 1")
    shares = {
        "data.holdout": config.data.holdout,
        "optimizer.warmup": config.optimizer.warmup,
        "optimizer.average": config.optimizer.average,
    }
    for field, value in shares.items():
        if not 0 <= value < 1:
            raise UserError(f"{field}={value}: give a share from 0 to below 1")
    _check_synthesis(config.synthesis)
    if not all(0 < rate < 1 for rate in config.thresholds.false_alarms):
        raise UserError(
            f"thresholds.false_alarms={config.thresholds.false_alarms}: give shares between 0 and 1"
        )
    # TensorFlow's draws take 31 bits of a seed, NumPy's 32.
    for field, bits in (("seed", 31), ("split_seed", 32)):
        if not 0 <= config[field] < 2**bits:
            raise UserError(f"{field}={config[field]}: give 0 to {2**bits - 1}")
    _check_some("attention.scales", config.attention.scales, (1, 2, 3))
    if not config.attention.divisions or not all(
        isinstance(x, int) and x >= 1 for x in config.attention.divisions
    ):
        raise UserError(
            f"attention.divisions={config.attention.divisions}: give whole numbers >= 1"
        )
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"dtype={config.dtype!r}: give auto, float32 or bfloat16")
    return config


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


def _check_memory(memory: ConfigDict) -> None:
    if memory.patches < 0:
        raise UserError(f"memory.patches={memory.patches}: give 0 or more")
    _check_some("memory.scales", memory.scales, (1, 2, 3))
    if memory.window < 0 or (memory.window and memory.window % 2 == 0):
        raise UserError(f"memory.window={memory.window}: give 0 or an odd number of places")


def _check_synthesis(synthesis: ConfigDict) -> None:
    for names, fits, mend in _SYNTHESIS:
        for name in names:
            if not fits(synthesis[name]):
                raise UserError(f"synthesis.{name}={synthesis[name]}: give {mend}")
    if max(synthesis.extended_opacity[1], synthesis.simulated_opacity[1]) > 1:
        raise UserError("synthesis.*_opacity: give at most 1")
