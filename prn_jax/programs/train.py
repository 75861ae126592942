"""Trains and evaluates PRN, one category after another.

    prn-jax train --config=mvtec --workdir=runs/mvtec --config.data.manual_dir=/data/mvtec_ad

Run it again with the same arguments to go on after an interruption.
"""

from absl import flags, logging

from prn_jax import program

CONFIG = program.define_config()
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


def run() -> None:
    """Parses the command line and runs."""
    program.run(main, afterwards="the same command goes on from the last checkpoint")
