"""Draws what training would see: a PNG of normal images, foregrounds, textures and anomalies.

    python launch/preview.py --config=configs/mvtec.py --config.category=bottle --output=bottle.png

Look at it before a long training: are the anomalies on the product, visible, and inside their
outlines?
"""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax import program  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", help_string="Configuration file.")
OUTPUT = flags.DEFINE_string(
    "output", "preview.png", "The PNG; with several categories their names are put before .png."
)
COLUMNS = flags.DEFINE_integer("columns", 8, "Images per row.", lower_bound=1)
flags.mark_flags_as_required(["config"])


def main() -> None:
    """Writes one sheet per category."""
    from prn_jax import experiment, input_pipeline, pictures, preview

    config = experiment.checked(CONFIG.value)
    output = pathlib.Path(OUTPUT.value).expanduser()
    names = experiment.categories(config)
    for name in names:
        with config.unlocked():
            config.category = name
        data = input_pipeline.load_category(config, name)
        sheet = preview.samples_sheet(config, data, COLUMNS.value)
        path = output.with_suffix(".png")
        if len(names) > 1:
            path = path.with_name(f"{path.stem}_{name}.png")
        pictures.save_png(path, sheet)
        print(path, flush=True)


if __name__ == "__main__":
    program.run(main)
