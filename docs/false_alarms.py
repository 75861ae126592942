r"""Promised and observed false alarms over draws of what is held out, without training.

    python docs/false_alarms.py --config=configs/mvtec.py --config.category=bottle \
        --config.data.manual_dir=MVTEC --config.image_size=128 --held=21 --draws=20

Of the normal training images `--held` set the thresholds, and `--judged` others and test/good say
how many false alarms there are; the rest is the memory of patches. Figures: docs/experiments.md.
"""

import pathlib
import sys

import numpy as np
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from ml_collections import config_flags  # noqa: E402

from prn_jax import program  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "Path of the configuration.")
HELD = flags.DEFINE_integer("held", 21, "Normal images that set the thresholds.")
JUDGED = flags.DEFINE_integer("judged", 21, "Normal images that false alarms are counted on.")
DRAWS = flags.DEFINE_integer("draws", 20, "Draws of what is held out.")
PATCHES = flags.DEFINE_integer("patches", 256, "Patches stored per scale.")
RATES = (0.01, 0.05)


def main() -> None:
    """Prints a line per draw and the means."""
    import jax

    from prn_jax import evaluate, experiment, input_pipeline, thresholds, train
    from prn_jax import mesh as meshes
    from prn_jax.models.prn import create_model
    from prn_jax.models.prototypes import num_prototypes

    config = experiment.checked(CONFIG.value)
    config.total_steps, config.memory.patches, config.data.holdout = 0, PATCHES.value, 0.0
    mesh = meshes.create_mesh(jax.devices()[:1])
    data = input_pipeline.load_category(config, config.category)
    count = len(data.train) - HELD.value - JUDGED.value
    model = create_model(config, num_prototypes(count, config.prototypes.ratio))
    variables = meshes.replicate(mesh, train.create_variables(config, model))
    whole = {rate: [] for rate in RATES}
    for seed in range(DRAWS.value):
        order = np.random.RandomState(seed).permutation(len(data.train))
        stored = train.fit_prototypes(
            config, model, variables, data.train.image[order[:count]], mesh
        )
        network = variables | {"prototypes": stored}

        def inspect(images, network=network):
            return evaluate.predict(model, network, images, mesh)

        normal = inspect(data.train.image[order[count:]])
        test = inspect(data.test.image)
        half = [x[: HELD.value] for x in normal], [x[HELD.value :] for x in normal]
        line = [f"draw {seed}:"]
        for rate in RATES:
            known = {
                "normal": {"source": "held out", "values": half[0][1].tolist()},
                "whole": {"source": "held out", "values": half[0][2].tolist()},
            }
            if HELD.value < thresholds.needed(rate):
                continue
            score = thresholds.for_false_alarms(known, rate)["value"]
            distance = thresholds.for_false_alarms(known, rate, "whole")["value"]
            normal_test = data.test.label == 0
            found = [
                np.mean(half[1][1] >= score),
                np.mean(test[1][normal_test] >= score),
                np.mean(test[1][~normal_test] >= score),
                np.mean(half[1][2] >= distance),
            ]
            whole[rate].append(found)
            line.append(f"{rate:.0%}: " + " ".join(f"{100 * x:.1f}" for x in found))
        print("  ".join(line), flush=True)
    for rate, rows in whole.items():
        if not rows:
            print(f"{rate:.0%}: takes {thresholds.needed(rate)} images")
            continue
        means = 100 * np.mean(rows, axis=0)
        print(
            f"promised {rate:.0%}: false alarms {means[0]:.1f} % of those judged, "
            f"{means[1]:.1f} % of test/good; recall {means[2]:.1f} %; "
            f"unfamiliar {means[3]:.1f} % of those judged"
        )


if __name__ == "__main__":
    program.run(main)
