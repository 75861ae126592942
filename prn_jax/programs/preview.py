"""Draws what training would see: a PNG of normal images, foregrounds, textures and anomalies.

    prn-jax preview --config=mvtec --config.category=bottle --output=bottle.png

Look at it before a long training: are the anomalies on the product, visible, and inside their
outlines?
"""

import os
import pathlib

from absl import flags

from prn_jax import program

CONFIG = program.define_config()
OUTPUT = flags.DEFINE_string(
    "output", "preview.png", "The PNG; with several categories their names are put before .png."
)
COLUMNS = flags.DEFINE_integer("columns", 8, "Images per row.", lower_bound=1)
flags.mark_flags_as_required(["config"])


def main() -> None:
    """Writes one sheet per category."""
    from prn_jax import datasets, experiment, input_pipeline, pictures, preview
    from prn_jax.errors import UserError, shown
    from prn_jax.fields import checked

    config = checked(CONFIG.value)
    output = pathlib.Path(os.path.expanduser(OUTPUT.value))
    if output.suffix.lower() != ".png" or output.is_dir():
        raise UserError(f"--output={shown(output)}: give the name of a .png file")
    datasets.check_outside(output, "--output", config.data.name, config.data.manual_dir)
    names = experiment.categories(config)
    for name in names:
        with config.unlocked():
            config.category = name
        data = input_pipeline.load_category(config, name)
        sheet = preview.samples_sheet(config, data, COLUMNS.value)
        path = output.with_stem(f"{output.stem}_{name}") if len(names) > 1 else output
        pictures.save_png(path, sheet)
        print(path, flush=True)


def run() -> None:
    """Parses the command line and runs."""
    program.run(main)
