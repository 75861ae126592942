r"""What the distance of a whole image tells, beside the distance of whole feature maps.

    python docs/unfamiliar.py --config=configs/mvtec.py --config.category=bottle \
        --config.data.manual_dir=MVTEC --config.image_size=128 --other=pill,grid

A fifth of the normal training images is held out. Printed is the image AUROC with which each
distance tells them from the same images changed, and from other categories' normal images.
"""

import pathlib
import sys

import numpy as np
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax import program  # noqa: E402

CONFIG = program.define_config()
OTHER = flags.DEFINE_list("other", [], "Categories that are another product.")


def main() -> None:
    """Prints a line per change: whole image, whole maps."""
    import jax
    from scipy import ndimage

    from prn_jax import evaluate, input_pipeline, metrics, train
    from prn_jax import mesh as meshes
    from prn_jax.fields import checked
    from prn_jax.models.prn import create_model
    from prn_jax.models.prototypes import num_prototypes

    config = checked(CONFIG.value)
    config.data.holdout, config.memory.patches = 0.2, 0
    mesh = meshes.create_mesh(jax.devices()[:1])
    data = input_pipeline.load_category(config, config.category)
    model = create_model(config, num_prototypes(len(data.train), config.prototypes))
    variables = meshes.replicate(mesh, train.create_variables(config, model))
    stored = train.fit_prototypes(config, model, variables, data.train.image, mesh)
    network = variables | {"prototypes": stored}
    features = jax.jit(lambda image: model.apply(network, image, method="features"))

    def whole_image(images):
        centres = np.asarray(stored["whole"]["centres"] / stored["whole"]["spread"])
        points = evaluate.describe(model, network, images, mesh)
        return np.linalg.norm(points[:, None] - centres, axis=-1).min(axis=1)

    def whole_maps(images):
        """Relative to the nearest prototype's length, summed over the scales."""
        total = np.zeros(len(images))
        for i, image in enumerate(images):
            for scale, x in enumerate(features(image[None])):
                maps = np.asarray(stored[f"scale_{scale}"]["maps"])
                squared = np.square(maps - np.asarray(x)).sum(axis=(1, 2, 3))
                best = squared.argmin()
                total[i] += np.sqrt(squared[best] / np.square(maps[best]).sum())
        return total

    held = data.held.image

    def light(*gain):
        return np.clip(np.round(held * np.array(gain)), 0, 255).astype(np.uint8)

    changed = {
        "light - 10 %": light(0.9),
        "light - 20 %": light(0.8),
        "light + 10 %": light(1.1),
        "red + 5 %, blue - 5 %": light(1.05, 1.0, 0.95),
        "blurred by a pixel": ndimage.gaussian_filter(held, (0, 1, 1, 0)),
        "upside down": np.ascontiguousarray(held[:, ::-1]),
        "moved by a twelfth": np.roll(held, held.shape[2] // 12, axis=2),
    }
    for category in OTHER.value:
        other = input_pipeline.load_category(config, category)
        changed[category] = other.test.image[other.test.label == 0]
    for name, images in changed.items():
        labels = np.repeat([0, 1], [len(held), len(images)])
        cells = [
            metrics.auroc(metrics.rank_images(np.concatenate([f(held), f(images)]), labels))
            for f in (whole_image, whole_maps)
        ]
        print(f"{name}: " + " ".join(f"{100 * x:.1f}" for x in cells), flush=True)


if __name__ == "__main__":
    program.run(main)
