"""Prints one line of JSON for each new image of a folder, for a production line's own program.

    prn-jax watch /data/camera --checkpoint=runs/bolts/bolt | your-program

A line has what predictions.json has of an image (score, verdict, unfamiliar, regions, error, ...)
and the seconds that it took. A file that is still being written is waited for. Ends by Ctrl-C
(exit status 130) or SIGTERM (143), and when nobody reads any more.
"""

import json
import os
import pathlib

from absl import flags

from prn_jax import program
from prn_jax.programs import verdicts

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "<workdir>/<category> of a training.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
EVERY = flags.DEFINE_float("every", 0.5, "Seconds between two looks at the folder.", 0.01)
EXISTING = flags.DEFINE_bool("existing", False, "Judge the images that are there already, too.")
flags.adopt_module_key_flags(verdicts)
flags.mark_flags_as_required(["checkpoint"])


def main(folders: list[str]) -> None:
    """Watches, until it is stopped."""
    import numpy as np
    from absl import logging

    from prn_jax import mesh, predict, watch
    from prn_jax.errors import UserError, shown

    if len(folders) != 1 or not pathlib.Path(os.path.expanduser(folders[0])).is_dir():
        raise UserError(f"{' '.join(folders) or 'nothing'}: give one folder to watch")
    folder = pathlib.Path(os.path.expanduser(folders[0]))
    arrivals = watch.new_images(folder, every=EVERY.value, existing=EXISTING.value)
    mesh.cache_compilations()
    detector = predict.load(CHECKPOINT.value, STEP.value, verdicts.WHITE_LEVEL.value)
    asked = verdicts.asked(detector)
    detector(np.zeros((*detector.image_size, 3), np.uint8))  # compiled before the first image
    logging.info("watching %s", shown(folder))
    try:
        for path in arrivals:
            print(json.dumps(watch.verdict(detector.inspect, path, asked)), flush=True)
    except BrokenPipeError:  # the end that a line's program wants
        program.discard_output()


def run() -> None:
    """Parses the command line and runs."""
    program.run(main, positional=True)
