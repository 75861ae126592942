"""A category's raw files as a whole: their fingerprint, and all that are wrong in one line."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from absl import logging

from prn_jax import images
from prn_jax.datasets import roi
from prn_jax.datasets.layout import GOOD, Example
from prn_jax.errors import UserError, shown, shown_first
from prn_jax.parallel import several_at_a_time

_PIECE, _PIECES = 4096, 5  # bytes that are hashed at a place of an image file, and places


def fingerprint(folder: pathlib.Path, examples: Iterable[Example]) -> str:
    """Hashes what a category's files are, to notice when they change.

    Names, sizes, of the images 4 KiB at five places (a JPEG's rotation is in its head, a PNG ends
    in its checksum, a TIFF may end in tables; uncompressed pixels of another photograph differ
    between by their noise), the whole masks, the region of interest. No times: hosts that share
    the TFRecords may have copied the raw files at different ones.
    """
    digest = hashlib.sha256()
    wrong = []
    for example in examples:
        for path in (example.image, example.mask):
            if path is None:
                continue
            try:
                size, content = _read(path, path is example.mask)
            except OSError as error:
                reason = f"{shown(path)}: cannot be read: {error.strerror}; mend or remove it"
                wrong.append((path, reason))
                continue
            name = os.fsencode(path.relative_to(folder))
            digest.update(b"%s\0%s\0%d\0" % (example.split.encode(), name, size) + content)
    refuse(wrong)
    digest.update(roi.content(folder))
    return digest.hexdigest()


def _read(path: pathlib.Path, whole: bool) -> tuple[int, bytes]:
    """A file's size, and its bytes: all of them, or those of some places."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if whole or size <= _PIECE * _PIECES:
            file.seek(0)
            return size, file.read()
        content = b""
        for number in range(_PIECES):
            file.seek(number * (size - _PIECE) // (_PIECES - 1))
            content += file.read(_PIECE)
        return size, content


def find_white(title: str, examples: Sequence[Example]) -> int:
    """The white of the camera that took the 16-bit files, over normal images; 0 without any."""
    deep = [x for x in examples if images.is_deep(x.image)]
    if not deep:
        return 0
    normal = [x for x in deep if x.split == "train" and x.defect in (GOOD, None)]

    def highest_of(example):
        with contextlib.suppress(UserError):  # refused with all others
            picture = images.read_picture(example.image)
            return max(picture.declared, int(picture.levels.max(initial=0)))
        return 0

    highest = max(several_at_a_time(highest_of, normal or deep))
    white = images.white_level(highest)
    logging.info(
        "%s: %d images of more than 8 bits become 8-bit, level %d being white (the highest that is "
        "declared or found in %d %s images is %d)",
        title, len(deep), white, len(normal or deep), "normal" if normal else "such", highest,
    )  # fmt: skip
    return white


def refuse(wrong: list[tuple[pathlib.Path, str]]) -> None:
    """Refuses all files that are wrong at once, with what is wrong with the first."""
    if wrong:
        paths, reasons = zip(*wrong)
        others = f"; wrong as well: {some(paths[1:])}" if len(wrong) > 1 else ""
        raise UserError(f"{reasons[0]}{others}")


def some(paths: Sequence[pathlib.Path]) -> str:
    """Their number, and the names of the first."""
    return f"{len(paths)} file{'s' if len(paths) > 1 else ''}: {shown_first(paths)}"


def differing(written: Mapping[tuple[str, str], int], official: Sequence[int]) -> list[str]:
    """Where the numbers of images are not the official ones.

    Args:
      written: images by split and defect.
      official: normal and defective ones to train on, then to test on.
    """
    kinds = ("train normal", "train defective", "test normal", "test defective")
    counted = dict.fromkeys(kinds, 0)
    for (split, defect), n in written.items():
        counted[f"{split} {'normal' if defect == GOOD else 'defective'}"] += n
    return [
        f"{counted[kind]} {kind} images (officially {n})"
        for kind, n in zip(kinds, official, strict=True)
        if counted[kind] != n
    ]


def stretched(proportions: dict[pathlib.Path, float]) -> list[pathlib.Path]:
    """The images whose width over height is far from that of most; KolektorSDD2's vary by 15 %."""
    if not proportions:
        return []
    usual = np.median(list(proportions.values()))
    return [path for path, x in proportions.items() if not 0.8 < x / usual < 1.25]
