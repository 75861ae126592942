"""What tests of prediction share: a detector that is quick, and calls of it."""

import csv
import dataclasses

import jax
import numpy as np
from PIL import Image

from configs import default
from prn_jax import mesh as meshes
from prn_jax import predict as predict_module
from prn_jax import predictions
from prn_jax.tables import Asked


@dataclasses.dataclass
class Stub:
    """A detector whose score is the image's mean; counts what it is given."""

    digest: str = "one"
    white_level: int = 0
    config: object = dataclasses.field(default_factory=default.get_config)
    calls: int = 0
    stop_after: int = 10**9
    mesh: object = dataclasses.field(default_factory=lambda: meshes.create_mesh(jax.devices()[:1]))
    sizes: list = dataclasses.field(default_factory=list)

    def inspect(self, images, batch_size, fill=False):
        self.sizes.append(batch_size if fill else len(images))
        if self.calls + len(images) > self.stop_after:
            raise KeyboardInterrupt
        self.calls += len(images)
        maps = [np.full(x.shape[:2], x.mean() / 255, np.float32) for x in images]
        scores = np.array([m.max(initial=0) for m in maps], np.float32)
        return predict_module.Inspection(maps, scores, 2 * scores)

    def describe(self, images):
        return np.array([[x.mean()] for x in images])


def draw(path, level, size=(5, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(path, **options)


def predict(folder, output, stub, *, batch_size=16, normals=None, **asked):
    names = predictions.find([str(folder)])
    asked = Asked(**{"threshold": 0.5} | asked)
    output = predictions.prepare(output)
    return predictions.predict_files(
        stub, names, output, asked, normals=normals, batch_size=batch_size
    )


def table(output):
    with (output / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def flat(row):
    """A row as the CSV table has it."""
    count = len(row["regions"]) if row["regions"] != "" else ""
    return {name: str(value) for name, value in (row | {"regions": count}).items()}
