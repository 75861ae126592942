"""Which images a network was trained on: their digests, beside its checkpoints.

By its pixels an image is known again in another folder and under another name.
"""

import json

from etils import epath

from prn_jax import disk
from prn_jax.errors import UserError, shown, shown_first
from prn_jax.splits import Images

_FILE = "trained_on.json"


def remember(
    folder: epath.PathLike, trained: Images, seen: Images, tested: Images, resumed: bool
) -> None:
    """Writes what a training's images are.

    Args:
      folder: of the checkpoints.
      trained: the normal images, at the network's size.
      seen: the seen anomalies.
      tested: the test images.
      resumed: there are checkpoints: what was written before was trained on as well.

    Raises:
      UserError: images that only the earlier part was trained on are to be tested on.
    """
    found = dict(zip(trained.digests + seen.digests, trained.id + seen.id))
    before = (recall(folder) or {}) if resumed else {}
    moved = before.keys() - found.keys()
    each = zip(tested.digests, tested.id) if moved else ()
    leaked = [id_ for digest, id_ in each if digest in moved]
    if leaked:
        raise UserError(
            f"the training so far has had {shown_first(leaked, 3)} among its images, which would "
            "be tested on now: put the images back, or give another --workdir"
        )
    stored = json.dumps(before | found, indent=0, sort_keys=True)
    disk.write_file(epath.Path(folder) / _FILE, stored + "\n")


def recall(folder: epath.PathLike) -> dict[str, str] | None:
    """Names by digest; None of a training by an earlier version, which kept none.

    Raises:
      UserError: the file is damaged.
    """
    path = epath.Path(folder) / _FILE
    try:
        stored = json.loads(path.read_text())
        return dict(stored.items())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{shown(path)} is damaged: copy it from the training's folder") from error
