import jax
import numpy as np

from configs import default
from prn_jax import fitting, train
from prn_jax import mesh as meshes
from tests import tiny


def test_prototypes_are_made_of_some_images_where_there_are_many():
    tiny.register()
    config = default.get_config()
    config.update_from_flattened_dict(tiny.FIELDS)
    config.memory.patches = 4
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    mesh = meshes.create_mesh(jax.devices()[:2])
    model = train.create_model(config, 2)
    variables = meshes.replicate(mesh, train.create_variables(config, model))

    def fit(images, most):
        config.prototypes.max_images = most
        found = fitting.fit_prototypes(config, model, variables, images, mesh)
        return jax.tree.map(np.asarray, found)

    some = fit(images, 3)
    jax.tree.map(np.testing.assert_array_equal, some, fit(images[[0, 2, 4]], 1000))
    assert np.abs(fit(images[:3], 1000)["scale_2"]["maps"] - some["scale_2"]["maps"]).max() > 0
