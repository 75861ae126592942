"""Which images a network was trained on, and which its thresholds are of: their digests, beside it.

By its pixels an image is known again in another folder and under another name.
"""

import json

from etils import epath

from prn_jax import disk
from prn_jax.errors import UserError, shown, shown_first
from prn_jax.splits import Images

_FILE, _JUDGED = "trained_on.json", "judged_on.json"


def remember(
    folder: epath.PathLike,
    trained: Images,
    seen: Images,
    tested: Images,
    held: Images,
    resumed: bool,
) -> None:
    """Writes what a training's images are.

    Args:
      folder: of the checkpoints.
      trained: the normal images, at the network's size.
      seen: the seen anomalies.
      tested: the test images.
      held: the normal images held out.
      resumed: there are checkpoints: what was written before was trained on as well.

    Raises:
      UserError: images that only the earlier part was trained on are to be tested on, or to set
        thresholds.
    """
    found = dict(zip(trained.digests + seen.digests, trained.id + seen.id))
    before = (recall(folder) or {}) if resumed else {}
    moved = before.keys() - found.keys()
    judged = dict(zip(tested.digests + held.digests, tested.id + held.id))
    leaked = [id_ for digest, id_ in judged.items() if digest in moved]
    if leaked:
        raise UserError(
            f"the training so far has had {shown_first(leaked, 3)} among its images, which would "
            "be tested on or held out now: put the images back, or give another --workdir"
        )
    for name, images in ((_FILE, before | found), (_JUDGED, judged)):
        stored = json.dumps(images, indent=0, sort_keys=True)
        disk.write_file(epath.Path(folder) / name, stored + "\n")


def recall(folder: epath.PathLike) -> dict[str, str] | None:
    """Names of what it was trained on by digest; None of an earlier version, which kept none.

    Raises:
      UserError: the file is damaged.
    """
    return _read(epath.Path(folder) / _FILE)


def judged_on(folder: epath.PathLike) -> dict[str, str]:
    """Names of the test images and those held out by digest; of an earlier version none.

    Raises:
      UserError: the file is damaged.
    """
    return _read(epath.Path(folder) / _JUDGED) or {}


def _read(path: epath.Path) -> dict[str, str] | None:
    try:
        stored = json.loads(path.read_text())
        return dict(stored.items())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{shown(path)} is damaged: copy it from the training's folder") from error
