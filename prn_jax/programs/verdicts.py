"""The flags that say what is white, and from which score, pixel and distance on it is an alarm."""

from absl import flags

THRESHOLD = flags.DEFINE_float(
    "threshold", None, "Score from which an image is anomalous; default: the checkpoint's."
)
FALSE_ALARMS = flags.DEFINE_float(
    "max_false_alarms",
    None,
    "Instead of --threshold: the share of normal images that may be called anomalous, as 0.01.",
)
COST_OF_MISS = flags.DEFINE_float(
    "cost_of_miss",
    None,
    "What an anomalous image that passes costs; with --cost_of_false_alarm, instead of "
    "--threshold: the least cost on the test images.",
)
COST_OF_FALSE_ALARM = flags.DEFINE_float(
    "cost_of_false_alarm",
    None,
    "What a normal image that is called anomalous costs; see --cost_of_miss.",
)
PIXEL_THRESHOLD = flags.DEFINE_float(
    "pixel_threshold", None, "Value from which a pixel is anomalous; default: the checkpoint's."
)
WHITE_LEVEL = flags.DEFINE_integer(
    "white_level",
    None,
    "Grey level that is white in images of more than 8 bits, as 4095; default: as in training.",
    lower_bound=1,
)
MIN_AREA = flags.DEFINE_integer(
    "min_area", 1, "Pixels of an image that an anomalous region has at least.", lower_bound=1
)


def asked(detector, **more):
    """What the flags ask of a detector, as `tables.Asked` with `more` of its fields; said once."""
    from absl import logging

    from prn_jax import thresholds
    from prn_jax.errors import UserError
    from prn_jax.tables import Asked

    for flag in (THRESHOLD, PIXEL_THRESHOLD):
        if flag.value is not None and not 0 <= flag.value <= 1:
            raise UserError(f"--{flag.name}={flag.value}: give a value from 0 to 1")
    basis = thresholds.select(
        detector.thresholds,
        threshold=THRESHOLD.value,
        max_false_alarms=FALSE_ALARMS.value,
        cost_of_miss=COST_OF_MISS.value,
        cost_of_false_alarm=COST_OF_FALSE_ALARM.value,
    )
    if basis is None:
        logging.warning("the checkpoint has no threshold: no verdicts; give --threshold")
    else:
        logging.info("threshold %.4f: %s", basis["value"], thresholds.describe(basis))
    whole = thresholds.select_distance(detector.thresholds, FALSE_ALARMS.value)
    if whole is not None:
        logging.info("unfamiliar from %.2f: %s", whole["value"], thresholds.describe(whole))
    pixel = PIXEL_THRESHOLD.value
    if pixel is None and detector.thresholds:
        pixel = detector.thresholds["pixel"]
    return Asked(
        threshold=basis and basis["value"],
        pixel_threshold=pixel,
        distance=whole and whole["value"],
        min_area=MIN_AREA.value,
        **more,
    )
