"""Why an image alarms: the normal image that it was trained on and that is most like it.

`checkpoints/normals.npz` keeps small copies of the normal training images with their descriptions
(`models.whole`): 4 to 7 kB each at 128x128. So a copy of the checkpoints explains as the run
does.
"""

import dataclasses
import io
import os
import zipfile

import numpy as np
from etils import epath
from PIL import Image
from scipy import spatial

from prn_jax import disk
from prn_jax.checkpoints import folder_of
from prn_jax.errors import UserError, shown
from prn_jax.predict import Detector

NAME = "normals.npz"
# Images kept, at most, spread evenly; their longer side in pixels; the quality of the JPEG files.
_MOST, _SIDE, _QUALITY = 1000, 192, 85


@dataclasses.dataclass(frozen=True)
class Normals:
    """Normal training images.

    Attributes:
      id: their ids.
      descriptor: float32 [n, d], in the unit of `WholeImage`.
      jpeg: their small copies, as files.
    """

    id: list[str]
    descriptor: np.ndarray
    jpeg: list[bytes]

    @classmethod
    def of(cls, ids: list[str], images: np.ndarray, descriptors: np.ndarray) -> "Normals":
        """From images, uint8 [n, h, w, 3], and what `evaluate.describe` makes of them."""
        return cls(ids, descriptors, [_jpeg(image) for image in images])

    def nearest(self, descriptors: np.ndarray) -> np.ndarray:
        """The number of the normal image nearest to each description, [m, d] -> int [m]."""
        return spatial.distance.cdist(descriptors, self.descriptor).argmin(axis=1)

    def picture(self, number: int) -> np.ndarray:
        """The small copy of one, uint8 [h, w, 3]."""
        return np.asarray(Image.open(io.BytesIO(self.jpeg[number])).convert("RGB"))

    def write(self, folder: epath.PathLike) -> None:
        """Writes them beside the checkpoints, into their folder."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            id=np.array(self.id, np.str_),
            descriptor=self.descriptor.astype(np.float32),
            jpeg=np.frombuffer(b"".join(self.jpeg), np.uint8),
            end=np.cumsum([len(x) for x in self.jpeg]),
        )
        disk.write_file(epath.Path(folder) / NAME, buffer.getvalue())


def kept(count: int) -> np.ndarray:
    """The numbers of the images that are kept of so many."""
    return np.unique(np.linspace(0, count - 1, min(count, _MOST)).round().astype(int))


def read(folder: str | os.PathLike) -> Normals:
    """Reads what `Normals.write` wrote.

    Args:
      folder: of the checkpoints, or the one that holds it.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = folder_of(epath.Path(os.path.expanduser(os.fspath(folder)))) / NAME
    try:
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            whole, end = stored["jpeg"].tobytes(), stored["end"].tolist()
            files = [whole[a:b] for a, b in zip([0, *end], end)]
            return Normals(stored["id"].tolist(), stored["descriptor"], files)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{shown(path)} is missing or damaged: there are no normal images to explain with; "
            "remove results.json of the run and run the category again (it is only evaluated)"
        ) from error


def explain(
    detector: Detector, normals: Normals, images: list[np.ndarray]
) -> list[tuple[str, np.ndarray]]:
    """For each image, of any size, the id and the small copy of the normal one most like it."""
    if not images:
        return []
    found = normals.nearest(detector.describe(images))
    return [(normals.id[number], normals.picture(number)) for number in found]


def _jpeg(image: np.ndarray) -> bytes:
    picture, buffer = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((_SIDE, _SIDE))
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
