"""Trains categories x seeds, and writes the table of means and standard deviations.

    prn-jax study --config=mvtec --workdir=runs/study --seeds=0,1,2

The same command goes on after an interruption: what is finished is not run again. `--config.*`
overrides hold for all runs; seed n trains with seed n and draws the seen anomalies with
`config.split_seed` + n. `--vary "config.attention.layers=0,3"` varies a field,
and `--ablations` leaves out one part of PRN after another; the table then has a row for each.
`--slurm` runs nothing and prints a job array.
"""

import os
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from prn_jax import program

if TYPE_CHECKING:
    from ml_collections import ConfigDict

CONFIG = program.define_config()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "[variation,]seed_<n>/<category> and the tables go here."
)
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of training.")
CATEGORIES = flags.DEFINE_list("categories", [], "Default: config.category, all that are found.")
PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time, each with its own devices.", 1)
SLURM = flags.DEFINE_bool("slurm", False, "Print a Slurm job array instead.")
VARY = flags.DEFINE_multi_string(
    "vary", [], "Field and values, as config.attention.layers=0,3; several make a grid."
)
ABLATIONS = flags.DEFINE_bool("ablations", False, "Vary by configs/ablations.py: a part left out.")
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on from a checkpoint although a field that matters changed."
)
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    """Runs the study, or prints it."""
    from prn_jax import study, study_tables
    from prn_jax.configs import ablations
    from prn_jax.errors import UserError

    if "://" in WORKDIR.value:
        raise UserError(f"--workdir={WORKDIR.value}: a study's logs and tables need a local folder")
    if not all(seed.strip().isdecimal() for seed in SEEDS.value) or not SEEDS.value:
        raise UserError(f"--seeds={','.join(SEEDS.value)}: give numbers, as in --seeds=0,1,2")
    seeds = list(dict.fromkeys(int(seed) for seed in SEEDS.value))
    config = CONFIG.value
    categories = _categories(config)
    overrides = study.overrides_of(sys.argv[1:])
    variations = study.vary(VARY.value)
    if ABLATIONS.value:
        if VARY.value:
            raise UserError("--ablations and --vary: give one of them")
        variations = ablations.variations(config)
    runs = study.plan(
        config, categories, seeds, WORKDIR.value, overrides, variations, ALLOW_CONFIG_CHANGE.value
    )
    if SLURM.value:
        print(study.slurm_array(runs, PARALLEL.value if PARALLEL.value > 1 else len(runs)), end="")
        return
    workdir = pathlib.Path(os.path.expanduser(WORKDIR.value))
    failed = study.execute(runs, workdir, PARALLEL.value)
    study_tables.write_study(runs, workdir, config.data.name)
    print((workdir / "study.md").read_text(), flush=True)
    if failed:
        names = "; ".join(run.name for run in failed)
        raise UserError(f"{len(failed)} of {len(runs)} runs did not end ({names}): see their logs")


def _categories(config: "ConfigDict") -> list[str]:
    """Those that are asked for, each known to be there."""
    from prn_jax import datasets, experiment
    from prn_jax.fields import checked

    config = checked(config)
    names = list(dict.fromkeys(name.strip() for name in CATEGORIES.value)) or [config.category]
    if "all" in names:
        config.category = "all"
        return experiment.categories(config)
    where = {"manual_dir": config.data.manual_dir, "data_dir": config.data.data_dir}
    for name in names:
        datasets.fingerprint(config.data.name, name, **where)
    return names


def run() -> None:
    """Parses the command line and runs."""
    program.run(main, afterwards="the same command goes on")
