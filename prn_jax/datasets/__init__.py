"""What is on disk: one TFDS builder per benchmark, one record format (see `base`).

The benchmarks are those of PRN's experiments (MVTec AD, DAGM 2007, BeanTech AD, KolektorSDD2), a
demo that needs no files, and `folder` for anybody's own images.
"""

import difflib
import os
import pathlib
from collections.abc import Iterable

from absl import logging

from prn_jax.datasets.base import AnomalyBuilder
from prn_jax.datasets.btad import Btad
from prn_jax.datasets.dagm2007 import Dagm2007
from prn_jax.datasets.demo import Demo
from prn_jax.datasets.folder import Folder
from prn_jax.datasets.kolektor_sdd2 import KolektorSdd2
from prn_jax.datasets.layout import GOOD
from prn_jax.datasets.mvtec_ad import MvtecAd
from prn_jax.errors import UserError, shown

BUILDERS: dict[str, type[AnomalyBuilder]] = {
    builder.name: builder for builder in (MvtecAd, Dagm2007, Btad, KolektorSdd2, Folder, Demo)
}


def available(
    name: str, manual_dir: str | os.PathLike, data_dir: str | os.PathLike | None = None
) -> list[str]:
    """Returns the categories whose raw files, or TFRecords if `data_dir` is given, are there."""
    builder = _builder(name)
    found = set(builder.sources(manual_dir))
    if data_dir is not None:
        found |= builder.prepared(manual_dir, data_dir)
    known = list(builder.counts)
    return [c for c in known if c in found] + sorted(found.difference(known))


def all_categories(
    name: str, manual_dir: str | os.PathLike, data_dir: str | os.PathLike
) -> list[str]:
    """Returns what "all" stands for: the categories whose raw files are there.

    TFRecords may be another project's. They count where `manual_dir` is "": no raw files anywhere,
    as on the workers of a TPU slice.

    Raises:
      UserError: there is no such data set, or nothing is found.
    """
    builder = _builder(name)
    found = available(name, manual_dir) if os.fspath(manual_dir) else []
    recorded = available(name, manual_dir, data_dir) if not found else []
    if not os.fspath(manual_dir):
        found = recorded
    if not found:
        hint = "TFRecords without raw files are used where the category is named"
        error = builder.nothing_found(manual_dir)
        if recorded:
            error = UserError(f"{error} ({hint}: there are {', '.join(recorded)})")
        raise error
    builder.look_for_slips(manual_dir)
    left_out = [category for category in builder.counts if category not in found]
    if left_out:
        logging.warning("not in %s, left out: %s", shown(manual_dir), ", ".join(left_out))
    return found


def prepare(
    name: str, category: str, *, manual_dir: str | os.PathLike, data_dir: str | os.PathLike
) -> AnomalyBuilder:
    """Returns a category's builder with its TFRecords written and up to date.

    Args:
      name: a key of `BUILDERS`.
      category: one of the data set's categories.
      manual_dir: the raw files, as the official archive unpacks. `~` is expanded.
      data_dir: where the TFRecords go, a local folder or gs://. `~` is expanded.

    Raises:
      UserError: there is no such data set or category, its files are not there, or one is wrong.
    """
    builder = _known(name, category, manual_dir, data_dir)
    return builder.prepare(category, manual_dir=manual_dir, data_dir=data_dir)


def fingerprint(
    name: str, category: str, *, manual_dir: str | os.PathLike, data_dir: str | os.PathLike
) -> str:
    """Returns the fingerprint of a category's raw files, or of its TFRecords where they are gone.

    Args and errors are those of `prepare`; nothing is written.
    """
    builder = _known(name, category, manual_dir, data_dir)
    return builder.find(category, manual_dir, data_dir)[2]


def count_anomalous(
    name: str, category: str, manual_dir: str | os.PathLike
) -> tuple[int, int] | None:
    """Counts the raw anomalous images to draw seen ones from, and those of them with a mask.

    Returns:
      None where only the masks' pixels tell, or there are no raw files.
    """
    builder = _builder(name)
    examples = builder.scan(category, manual_dir)
    drawn = [x for x in examples if x.split == builder.seen_from and x.defect != GOOD]
    if not examples or any(x.defect is None for x in drawn):
        return None
    return len(drawn), sum(x.mask is not None for x in drawn)


def check_outside(
    path: str | os.PathLike, flag: str, name: str, manual_dir: str | os.PathLike
) -> None:
    """Refuses to write among the raw files of a data set, where it would be taken for some of them.

    Args:
      path: where something is to be written.
      flag: that gave it, for the message.
      name: a key of `BUILDERS`.
      manual_dir: see `prepare`.

    Raises:
      UserError: it lies in a category's folder.
    """
    place = pathlib.Path(os.path.realpath(os.path.expanduser(path)))
    for source in _builder(name).sources(manual_dir).values():
        if place.is_relative_to(os.path.realpath(source)):
            raise UserError(
                f"{flag}={shown(path)}: that would be written among the images in {shown(source)}; "
                "give another place"
            )


def _known(
    name: str, category: str, manual_dir: str | os.PathLike, data_dir: str | os.PathLike
) -> type[AnomalyBuilder]:
    """The builder of a data set that has the category."""
    builder = _builder(name)
    known = list(builder.counts) or available(name, manual_dir, data_dir)
    if not known:
        raise builder.nothing_found(manual_dir)
    if category not in known:
        builder.look_for_slips(manual_dir, category)
        raise UserError(f"no category {category!r} in {name}; {_nearest(category, known)}")
    return builder


def _builder(name: str) -> type[AnomalyBuilder]:
    if name not in BUILDERS:
        raise UserError(f"no data set {name!r} (data.name); {_nearest(name, BUILDERS)}")
    return BUILDERS[name]


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
