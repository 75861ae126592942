r"""Promised and observed false alarms over draws of what is held out, without training.

    python docs/false_alarms.py --config=configs/mvtec.py --config.category=bottle \
        --config.data.manual_dir=MVTEC --config.image_size=128 --held=21 --draws=20

Of the normal training images `--held` set the thresholds, and `--judged` others and test/good say
how many false alarms there are; the rest is the memory of patches. Figures are in
docs/experiments_use.md.
"""

import functools
import pathlib
import sys

import numpy as np
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax import program  # noqa: E402

CONFIG = program.define_config()
HELD = flags.DEFINE_integer("held", 21, "Normal images that set the thresholds.")
JUDGED = flags.DEFINE_integer("judged", 21, "Normal images that false alarms are counted on.")
DRAWS = flags.DEFINE_integer("draws", 20, "Draws of what is held out.")
PATCHES = flags.DEFINE_integer("patches", 256, "Patches stored per scale.")
RATES = flags.DEFINE_multi_float("rate", [0.01, 0.05], "Shares of false alarms to promise.", 0, 1)


def main() -> None:
    """Prints a line per draw and the means."""
    import jax

    from prn_jax import evaluate, input_pipeline, thresholds, train
    from prn_jax import mesh as meshes
    from prn_jax.fields import checked
    from prn_jax.models.memory import choose_patches
    from prn_jax.models.prn import create_model
    from prn_jax.models.prototypes import num_prototypes
    from prn_jax.models.whole import fit_whole

    config = checked(CONFIG.value)
    config.total_steps, config.memory.patches, config.data.holdout = 0, PATCHES.value, 0.0
    config.score_distance = 0.0  # of the map alone
    mesh = meshes.create_mesh(jax.devices()[:1])
    data = input_pipeline.load_category(config, config.category)
    count = len(data.train) - HELD.value - JUDGED.value
    model = create_model(config, num_prototypes(count, config.prototypes))
    variables = train.create_variables(config, model)
    size = config.eval_batch_size

    @jax.jit
    def extract(image):
        maps = model.apply(variables, image, method="features")
        return *maps, model.apply(variables, image, method="descriptor")

    @jax.jit
    def inspect(stored, *features):
        *maps, descriptor = features
        network = {"prototypes": stored}
        logits = model.apply(network, (None, *maps, None), False, method="decode")
        distance = model.apply(network, descriptor, method=lambda network, x: network.whole(x))
        return evaluate.image_score(jax.nn.sigmoid(logits), config.score_pixels), distance

    def in_batches(step, *arrays):
        parts = [step(*(x[i : i + size] for x in arrays)) for i in range(0, len(arrays[0]), size)]
        return [np.concatenate([np.asarray(x) for x in found]) for found in zip(*parts)]

    # Features are frozen: they are computed once.
    normal_features = in_batches(extract, data.train.image)
    test_features = in_batches(extract, data.test.image)
    channels = (3, *(x.shape[-1] for x in normal_features[:-1]))
    whole = {rate: [] for rate in RATES.value}
    for seed in range(DRAWS.value):
        order = np.random.RandomState(seed).permutation(len(data.train))
        kept = [x[order[:count]] for x in normal_features]
        key = jax.random.key(seed)
        stored = {
            "patch_map": {"reference": np.float32(20.0)},
            "whole": fit_whole(kept[-1], channels, model.num_centres, key, mesh),
        }
        for scale, maps in enumerate(kept[:-1]):
            patches = choose_patches(maps, PATCHES.value, seed)
            stored |= {
                f"scale_{scale}": {"maps": maps[:1]},
                f"memory_{scale}": {"patches": patches},
            }
        step = functools.partial(inspect, stored)
        normal = in_batches(step, *(x[order[count:]] for x in normal_features))
        test = in_batches(step, *test_features)
        half = [x[: HELD.value] for x in normal], [x[HELD.value :] for x in normal]
        line = [f"draw {seed}:"]
        for rate in whole:
            known = {
                "normal": {"source": "held out", "values": half[0][0].tolist()},
                "whole": {"source": "held out", "values": half[0][1].tolist()},
            }
            if HELD.value < thresholds.needed(rate):
                continue
            limit = thresholds.for_false_alarms(known, rate)["value"]
            distance = thresholds.for_false_alarms(known, rate, "whole")["value"]
            normal_test = data.test.label == 0
            found = [
                np.mean(half[1][0] >= limit),
                np.mean(test[0][normal_test] >= limit),
                np.mean(test[0][~normal_test] >= limit),
                np.mean(half[1][1] >= distance),
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
