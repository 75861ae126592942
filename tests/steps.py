"""Real training steps on any devices, and the evaluation after them, for comparisons.

In a process of its own: `python -m tests.steps RECORDS PROTOTYPES COORDINATOR COUNT NUMBER OUTPUT`.
"""

import pathlib
import sys

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import demo, folder
from prn_jax import evaluate, experiment, fitting, input_pipeline, metrics, train
from prn_jax import mesh as meshes
from prn_jax.fields import checked
from prn_jax.models.prn import create_model
from prn_jax.models.prototypes import num_prototypes
from tests import tiny
from tests.trees import make_mvtec

# Named as people name theirs; brackets are a pattern to whoever globs.
PRODUCT = "Würfel [2] 骰子"
PLACE = pathlib.Path("w [2] ü") / PRODUCT


def small_config(records, **changes):
    """The demo at 64x64 pixels, batch 8, one attention layer, on a small backbone."""
    tiny.register()
    config = demo.get_config()
    config.update_from_flattened_dict(tiny.FIELDS | {
        "data.data_dir": str(records), "total_steps": 20, "dtype": "float32",
        "attention.layers": 1, "fusion.enabled": True, "prototypes.iterations": 5,
        "decoder.width": 0.25, "optimizer.learning_rate": 1e-3,
    } | changes)  # fmt: skip
    return checked(config)


def train_briefly(root):
    """Two steps at 64x64 pixels from random weights, of six images; into `PLACE`."""
    make_mvtec(root / "raw [0] *", PRODUCT, defects={"Riß [1]": 12}, train=6, good=4, size=(64, 64))
    config = folder.get_config()
    config.update_from_flattened_dict({
        "data.manual_dir": str(root / "raw [0] *"), "data.data_dir": str(root / "records"),
        "image_size": (64, 64), "backbone.weights": "random", "prototypes.iterations": 3,
        "synthesis.max_textures": 20, "batch_size": 8, "total_steps": 2,
    })  # fmt: skip
    experiment.train_and_evaluate(config, str(root / PLACE.parent))


def fit_prototypes(config, data, mesh):
    """The `prototypes` collection, NumPy."""
    model = create_model(config, num_prototypes(len(data.train), config.prototypes))
    variables = meshes.replicate(mesh, train.create_variables(config, model))
    return jax.device_get(fitting.fit_prototypes(config, model, variables, data.train.image, mesh))


def make_batches(config, data):
    """This process's part of all batches."""
    batches = input_pipeline.train_batches(
        config,
        data,
        total_steps=config.total_steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return [{name: batch[name] for name in ("image", "mask")} for batch in batches]


def run(config, data, batches, mesh, prototypes, dtype=np.float32):
    """Trains on all batches and evaluates the test split.

    Args:
      config: from `small_config`; `dtype` is the type of computing.
      data: of the demo.
      batches: from `make_batches`.
      mesh: devices, of one or several processes.
      prototypes: from `fit_prototypes`.
      dtype: of parameters, statistics and the optimiser's state.

    Returns:
      The module, its variables, the losses [steps], the scores [n] and the metrics.
    """
    clusters = len(prototypes["scale_0"]["maps"])
    model = create_model(config, clusters)
    variables = train.create_variables(config, model)
    variables = meshes.replicate(mesh, jax.tree.map(lambda x: x.astype(dtype), variables))
    optimizer = train.create_optimizer(config, config.total_steps)
    state = train.create_state(config, variables, optimizer, mesh)
    frozen = meshes.replicate(mesh, {"prototypes": prototypes}) | {
        "backbone": variables["backbone"]
    }
    step = train.make_train_step(config, model, optimizer, mesh)
    losses = []
    for batch in batches:
        state, values = step(state, frozen, meshes.shard(mesh, batch))
        losses.append(float(values["loss"]))
    variables = {"params": state.params, "batch_stats": state.batch_stats, **frozen}
    maps, scores, _ = predict(model, variables, data, mesh)
    found = metrics.evaluate_rankings(
        metrics.rank_images(scores, data.test.label), metrics.rank_pixels(maps, data.test.mask)
    )
    return model, variables, np.array(losses), scores, found


def predict(model, variables, data, mesh):
    """Maps and scores of the test split."""
    return evaluate.predict(model, variables, data.test.image, mesh, batch_size=8)


def main(records, prototypes, coordinator, count, number, output):
    meshes.initialize(coordinator, int(count), int(number))
    config, mesh = small_config(records), meshes.create_mesh()
    data = input_pipeline.load_category(config, config.category)
    batches = make_batches(config, data)
    own = fit_prototypes(config, data, mesh)
    with np.load(prototypes) as file:
        given = unflatten_dict({name: file[name] for name in file.files}, sep=".")
    with jax.enable_x64(True):
        config.dtype = "float64"
        _, _, losses, scores, found = run(config, data, batches, mesh, given, np.float64)
    if meshes.is_main():
        own = flatten_dict(own, sep=".")
        np.savez(pathlib.Path(output), losses=losses, scores=scores, **own, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
