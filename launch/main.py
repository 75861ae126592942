"""Trains and evaluates PRN, one category after another.

    python launch/main.py --config=configs/mvtec.py --workdir=runs/mvtec \
        --config.data.manual_dir=/data/mvtec_ad --config.category=bottle

Run it again with the same arguments to go on after an interruption.
"""

import pathlib
import sys

from absl import flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax import program  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", help_string="Configuration file.")
WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints, logs and results go here.")
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on from a checkpoint although a field that matters changed."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, by hand.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run, by hand.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, by hand.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    """Trains and evaluates."""
    from prn_jax import experiment, mesh

    mesh.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if not mesh.is_main():
        logging.set_verbosity(logging.WARNING)  # process 0 reports
    experiment.train_and_evaluate(
        CONFIG.value, WORKDIR.value, allow_config_change=ALLOW_CONFIG_CHANGE.value
    )


if __name__ == "__main__":
    program.run(main, afterwards="the same command goes on from the last checkpoint")
