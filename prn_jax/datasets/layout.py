"""Where images and masks lie: MVTec AD's layout, and what other layouts share with it."""

import contextlib
import dataclasses
import difflib
import os
import pathlib
import re
from collections.abc import Iterable

import numpy as np

from prn_jax import images
from prn_jax.errors import UserError, normal_form, shown
from prn_jax.masks import read_mask_file

GOOD = "good"
INVERTED = "masks that mark more than half of the image, inverted?"
# What folders of normal images are called elsewhere, letters only.
_NORMAL_NAMES = (
    *("good", "goods", "ok", "okay", "normal", "normals", "nominal", "pass", "passed", "fine"),
    *("nondefective", "defectfree", "nodefect", "nodefects", "faultfree", "clean", "negative"),
)
# What is put before or behind an image's name to name its mask.
_WORD = "(mask|gt|label|groundtruth|ground_truth|seg|annotation)"
_MASK_WORD = re.compile(rf"^{_WORD}[-_. ]|[-_. ]?{_WORD}$", re.I)
# What folders of masks beside folders of images are called.
_MASK_FOLDER = re.compile("(masks?|gt|ground[-_ ]?truth|segs?|labels?|annotations?)$", re.I)


@dataclasses.dataclass(frozen=True)
class Example:
    """One image of a category, and where its mask is.

    `defect` is "good" for a normal image and None where only the mask tells.
    """

    id: str
    split: str
    defect: str | None
    image: pathlib.Path
    mask: pathlib.Path | None


def list_images(
    folder: pathlib.Path, stray: list[pathlib.Path], folders: Iterable[str] = ()
) -> dict[str, pathlib.Path]:
    """Lists the image files below a folder by their path in it, without extension, sorted.

    Args:
      folder: the folder; where it does not exist the result is empty.
      stray: gets what has no business here.
      folders: the names of subfolders that are read on their own.

    Raises:
      UserError: two files differ only in their extension, so that their ids would be equal.
    """
    files, skipped = images.find_images(folder, besides=folders)
    drawn = {x for x in files if images.is_prediction(x)}
    files = [x for x in files if x not in drawn]
    stray.extend(sorted((*skipped, *drawn)))
    found: dict[str, pathlib.Path] = {}
    for path in files:
        stem = normal_form(shown(path.relative_to(folder).with_suffix("").as_posix()))
        if stem in found:
            raise UserError(
                f"{shown(found[stem])} and {shown(path)} have the same name but for the extension; "
                "rename one of them"
            )
        found[stem] = path
    return found


def out_of_place(folder: pathlib.Path, known: Iterable[str]) -> list[pathlib.Path]:
    """What lies right in a folder of folders, but those that are known."""
    try:
        there = folder.iterdir() if os.path.isdir(folder) else ()
        return sorted(x for x in there if x.name not in known)
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be read: {error.strerror}") from error


def pair_masks(
    found: dict[str, pathlib.Path], masks: dict[str, pathlib.Path], suffixes: Iterable[str]
) -> dict[str, pathlib.Path]:
    """Finds each image's mask, named `<stem><suffix>`; returns masks by the images' stems.

    Raises:
      UserError: a mask has no image, or an image has two masks.
    """
    masks = dict(masks)
    paired: dict[str, pathlib.Path] = {}
    for suffix in suffixes:
        for stem in found:
            mask = masks.pop(stem + suffix, None)
            if mask is not None and stem in paired:
                two = f"{shown(paired[stem])} and {shown(mask)}"
                raise UserError(f"{shown(found[stem])} has two masks, {two}; remove one")
            if mask is not None:
                paired[stem] = mask
    for stem, mask in masks.items():
        raise UserError(
            f"{shown(mask)}: a mask without an image; "
            f"{_likely(stem, found, paired, suffixes, masks)}"
        )
    return paired


def _likely(
    stem: str,
    found: dict[str, pathlib.Path],
    paired: Iterable[str],
    suffixes: tuple[str, ...],
    masks: Iterable[str],
) -> str:
    """The advice on a mask of that name which, as all of `masks`, belongs to no image."""
    names = " or ".join(f"<image's name>{suffix}.*" for suffix in suffixes)
    looked = f"masks are looked for as {names}"
    free = [x for x in found if x not in paired]
    inside = [x for x in free if x.rsplit("/", 1)[-1] in stem]
    close = [max(inside, key=len)] if inside else difflib.get_close_matches(stem, free, n=1)
    if not close:
        return f"add its image or remove the mask ({looked})"
    name = f"{close[0].rsplit('/', 1)[-1]}{suffixes[0]}"
    same = re.compile(rf"{re.escape(close[0])}[-_. /]")
    several = [x for x in masks if same.match(x)]
    if len(several) > 1:
        return f"join the {len(several)} masks of {shown(found[close[0]])} into one, {name}"
    return f"did you mean {name}, the mask of {shown(found[close[0]])}? {looked}; rename it"


def check_train(train: pathlib.Path, normal: str = GOOD) -> None:
    """Asks about a folder of normal training images that is called otherwise.

    Raises:
      UserError: naming it.
    """
    for path in out_of_place(train, (normal,)):
        if path.is_dir() and is_normal(path.name):
            raise UserError(
                f"{shown(path)}: is this the folder of normal images? rename it "
                f"{shown(train / normal)}"
            )


def scan_folders(
    folder: pathlib.Path,
    stray: list[pathlib.Path],
    *,
    normal: str,
    suffixes: tuple[str, ...],
    needs_masks: bool = True,
) -> list[Example]:
    """Reads MVTec AD's layout, which others took over.

    `train/<normal>`, `test/<normal>`, `test/<defect>`, `ground_truth/<defect>/<stem><suffix>`, and
    subfolders of each, a mask's like its image's.

    Args:
      folder: the category's folder.
      stray: gets the stray files and folders.
      normal: what the folders of normal images are called.
      suffixes: what may follow the image's stem in its mask's name.
      needs_masks: whether a defective image without a mask is an error.

    Returns:
      The examples.

    Raises:
      UserError: a defective image has no mask though it needs one, a mask no image, or there is an
        ambiguous name.
    """
    parts = ("train", "test", "ground_truth")
    for path in () if (folder / parts[2]).is_dir() else out_of_place(folder, parts):
        if _MASK_FOLDER.match(path.name) and images.find_images(path)[0]:
            raise UserError(
                f"{shown(path)}: is this the folder of masks? rename it {shown(folder / parts[2])}"
            )
    # A region of interest lies in the product's folder, and is called so.
    stray.extend(
        x
        for x in out_of_place(folder, parts)
        if x.is_dir() or (images.is_image(x) and not images.is_region(x))
    )
    with contextlib.suppress(UserError):  # what lies above may be another's
        stray.extend(x for x in out_of_place(folder.parent, ()) if images.is_region(x))
    stray.extend(out_of_place(folder / "train", (normal,)))
    train = list_images(folder / "train" / normal, stray)
    if not train:
        check_train(folder / "train", normal)
    check_normal(train)
    examples = [Example(f"train/{normal}/{k}", "train", GOOD, v, None) for k, v in train.items()]
    folders = {part: _subfolders(folder / part) for part in parts[1:]}
    for part, own in folders.items():
        # An image there belongs to no defect.
        stray.extend(out_of_place(folder / part, [path.name for path in own.values()]))
    listed = {
        name: [list_images(own[name], stray) if name in own else {} for own in folders.values()]
        for name in sorted({name for own in folders.values() for name in own})
    }
    defects = (found for name, (found, _) in listed.items() if not _MASK_FOLDER.match(name))
    others = {x for found in defects for x in _by_name(found)}
    for name, (found, masks) in listed.items():
        _check_names(folder, name, normal, found, masks, suffixes, others)
        free = {x.lower(): x for x, (images_, own) in listed.items() if images_ and not own}
        alike = difflib.get_close_matches(name.lower(), free.keys() - {normal}, n=1)
        if masks and not found and alike:
            meant = free[alike[0]]
            raise UserError(
                f"{shown(folder / 'ground_truth' / name)}: did you mean {shown(meant)}, the "
                f"masks of {shown(folder / 'test' / meant)}? rename it"
            )
        paired = pair_masks(found, masks, suffixes)
        for stem, path in found.items():
            if name != normal and stem not in paired and needs_masks:
                mask = folder / "ground_truth" / name / f"{stem}{suffixes[0]}.png"
                raise UserError(
                    f"{shown(path)}: a defective image without a mask; expected {shown(mask)}"
                )
            defect = GOOD if name == normal else shown(name)
            id_ = f"test/{shown(name)}/{stem}"
            examples.append(Example(id_, "test", defect, path, paired.get(stem)))
    return examples


def _subfolders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folders in a folder by their names, without links to what is read already."""
    found: dict[str, pathlib.Path] = {}
    read = {os.path.realpath(folder), *map(str, pathlib.Path(os.path.realpath(folder)).parents)}
    there = [x for x in out_of_place(folder, ()) if images.why_skipped(x) == "a folder"]
    for path in sorted(there, key=lambda x: x.is_symlink()):
        if (place := os.path.realpath(path)) not in read:
            read.add(place)
            found[normal_form(path.name)] = path
    return found


def check_normal(found: dict[str, pathlib.Path]) -> None:
    """Asks about masks and regions of interest among normal images.

    Raises:
      UserError: naming it.
    """
    named = _by_name(found)
    for stem, image in found.items():
        if (plain := _image_of(stem, found, named)) is not None:
            raise UserError(
                f"{shown(image)}: is this the mask of {shown(found[plain])}? Normal images need "
                "none, and it would be taken for one of them; remove it"
            )
        if images.is_region(image):
            raise UserError(
                f"{shown(image)}: is this a region of interest? It lies in the product's folder, "
                "beside train and test; move it there, or rename it"
            )


def read_mask(example: Example, size: tuple[int, int]) -> np.ndarray:
    """Reads an example's mask, uint8 [h, w] in {0, 255}; all 0 where it has none.

    Args:
      example: one image.
      size: (height, width) of the image.

    Raises:
      UserError: the mask is of another size, or that of a normal image is not empty.
    """
    if example.mask is None:
        return np.zeros(size, np.uint8)
    mask = read_mask_file(example.mask)
    if mask.shape != size:
        raise UserError(
            f"{shown(example.image)} is {size[1]}x{size[0]} pixels but its mask "
            f"{shown(example.mask)} {mask.shape[1]}x{mask.shape[0]}; make them equal"
        )
    if example.defect == GOOD and mask.any():
        raise UserError(
            f"{shown(example.image)} is a normal image but its mask {shown(example.mask)} "
            "is not empty; move the image or remove the mask"
        )
    return mask


def seems_inverted(mask: np.ndarray) -> bool:
    """Whether a mask marks more than half of its image; MVTec's largest, transistor's, 0.494."""
    return 2 * np.count_nonzero(mask) > mask.size


def is_normal(name: str) -> bool:
    """Whether folders of normal images are called so elsewhere."""
    return re.sub("[^a-z]", "", name.lower()) in _NORMAL_NAMES


def _check_names(
    folder: pathlib.Path,
    name: str,
    normal: str,
    found: dict[str, pathlib.Path],
    masks: dict[str, pathlib.Path],
    suffixes: tuple[str, ...],
    others: set[str],
) -> None:
    """Asks about the likely slips: normal images or masks among the defective images.

    `others` are the names, without folders, of test images in folders that are not called as masks.
    """
    if name == normal:
        check_normal(found)
        return
    path = folder / "test" / name
    if is_normal(name) and not any(read_mask_file(x).any() for x in masks.values()):
        raise UserError(
            f"{shown(path)}: is this the folder of normal images? Nothing is marked in its images, "
            f"and defects are not called so; rename it {shown(folder / 'test' / normal)}"
        )
    named = _by_name(found)
    plain = {_MASK_WORD.sub("", x) for x in named}
    if plain and plain <= others and not masks and _MASK_FOLDER.match(name):
        raise UserError(
            f"{shown(path)}: is this a folder of masks? They lie in "
            f"{shown(folder / 'ground_truth')}; if it is a defect, call it otherwise"
        )
    for stem, image in found.items():
        has_mask = any(stem + suffix in masks for suffix in suffixes)
        if not has_mask and (plain := _image_of(stem, found, named)) is not None:
            mask = folder / "ground_truth" / name / f"{plain}{suffixes[0]}{image.suffix}"
            raise UserError(
                f"{shown(image)}: is this the mask of {shown(found[plain])}? "
                f"Masks are looked for in ground_truth; move it to {shown(mask)}"
            )


def _by_name(found: Iterable[str]) -> dict[str, list[str]]:
    """Stems by their last part: the name, without the folders that it lies in."""
    named: dict[str, list[str]] = {}
    for stem in found:
        named.setdefault(stem.rpartition("/")[2], []).append(stem)
    return named


def _image_of(stem: str, found: dict[str, pathlib.Path], named: dict[str, list[str]]) -> str | None:
    """The image whose mask, by its name, is among the images; None where it is no mask."""
    above, _, last = stem.rpartition("/")
    plain = _MASK_WORD.sub("", last)
    same_folder = f"{above}/{plain}" if above else plain
    if plain != last and same_folder in found:
        return same_folder
    beside, _, folder = above.rpartition("/")
    if not _MASK_FOLDER.match(folder):
        return None
    for other in named.get(plain, ()):  # beside the folder of masks, or in another beside it
        place = other.rpartition("/")[0]
        if place != above and beside in (place, place.rpartition("/")[0]):
            return other
    return None
