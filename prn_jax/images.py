"""Image files of any kind, brought to what a record holds, and to the network's size.

Which files are images, how they are decoded and how they are resized is decided here alone, for
training, evaluation and prediction. Records keep an 8-bit RGB or grey PNG or JPEG byte for byte.
Everything else that Pillow opens (BMP, TIFF, 16-bit, CMYK, palette, alpha, EXIF rotation, ...) is
decoded and encoded anew as an 8-bit RGB PNG.
"""

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Iterable

import numpy as np
from absl import logging
from PIL import Image, PngImagePlugin, TiffTags

from prn_jax import deep
from prn_jax.errors import UserError, shown, shown_first

# The files are the user's own, however large they and their metadata are.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30

# What Pillow opens, but as a preview of a document, an icon, a film, or only with more software.
_NO_PICTURES = (
    *("BUFR", "CUR", "EPS", "FLI", "GRIB", "HDF5", "ICNS", "ICO", "IPTC", "MPEG", "PCD", "PSD"),
    "WMF",
)
# Files that operating systems and programs put among the images.
_JUNK = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"}
    | {"lost+found", "system volume information", "$recycle.bin"}  # of a disk's own
)

PREDICTION = "PRN prediction"  # in the metadata of what a prediction draws, of TIFF as this tag
DESCRIPTION = TiffTags.lookup(270).value
_DRAWN = ("_heat.png", "_overlay.png", "_mask.png", "_why.png", ".tiff")  # `tables.Asked.files`
_BITS = (8, 10, 12, 14, 16)  # that cameras have
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_ZEROS, _TRAILER = 512, 2**16  # bytes, see `_is_cut`; some cameras write behind the end


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image file as it was found, turned upright.

    Attributes:
      levels: uint8 or uint16, [h, w] or [h, w, 3].
      data: the file's bytes.
      is_plain: whether TensorFlow, too, decodes `data` to `levels`: 8-bit grey or RGB PNG or JPEG.
      pages: images in the file; `levels` is the first.
      declared: the highest level that the file says it may hold; 0 where it doesn't say.
      transparent: whether the file has transparent pixels; `levels` has their colours.
    """

    levels: np.ndarray
    data: bytes
    is_plain: bool
    pages: int
    declared: int
    transparent: bool = False


# --- which files ----------------------------------------------------------------------------------


@functools.cache
def extensions() -> frozenset[str]:
    """The names' endings, in lower case, of the files that are taken for images."""
    formats = _formats()
    return frozenset(x for x, kind in Image.registered_extensions().items() if kind in formats)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(x for x in Image.OPEN if x not in _NO_PICTURES)


def is_image(path: pathlib.Path) -> bool:
    """Whether a file is taken for an image: by its name, and not hidden. A folder never is."""
    return not why_skipped(path)


def why_skipped(path: pathlib.Path) -> str:
    """Says why a path is not taken for an image; "" where it is."""
    if path.name.startswith(".") or path.name.lower() in _JUNK:
        return "hidden or a system's"
    is_named = path.suffix.lower() in extensions()
    # A link that leads nowhere is an image that can't be read, which its reader says; so is a file
    # of which a share says nothing.
    with contextlib.suppress(OSError):
        if path.is_dir():
            return "a folder"
        if is_named and not (path.is_file() or path.is_symlink()):
            return "not a file but a device or a pipe"
    return "" if is_named else "no type of image that Pillow reads"


def is_region(path: pathlib.Path) -> bool:
    """Whether a file is called as a region of interest is."""
    return path.stem.lower() == "roi" and is_image(path)


def is_prediction(path: pathlib.Path) -> bool:
    """Whether a file is a picture that a prediction drew, which is no image of a product."""
    try:
        if not path.name.endswith(_DRAWN) or not path.is_file():
            return False
        with Image.open(path) as image:
            tags = getattr(image, "tag_v2", {})
            return PREDICTION in (image.info.get("Description"), tags.get(DESCRIPTION))
    except Exception:  # its reader says what is wrong
        return False


def find_images(
    folder: pathlib.Path,
    besides: Iterable[str] = (),
    closed: list[pathlib.Path] | None = None,
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Finds all image files below a folder.

    Links to folders are followed, after the folders themselves, and none is read twice.

    Args:
      folder: where to look; where it does not exist both lists are empty.
      besides: names of subfolders, right in `folder`, that are left out.
      closed: gets the subfolders that cannot be read, which are left out then.

    Returns:
      The image files, and what was skipped: files that are none, hidden folders (as a whole), and
      links to folders that were read already; both sorted.

    Raises:
      UserError: a folder can't be read, `folder` itself where `closed` is given.
    """
    if not folder.is_dir():
        return [], []
    # A link to a folder above would lead to what is none of this folder's.
    read = {_identity(above) for above in folder.resolve().parents}
    found, skipped, pending, links = [], [], [folder], []
    while pending or links:
        path = pending.pop() if pending else links.pop(0)
        try:
            if _identity(path) in read:
                skipped.append(path)
                continue
            read.add(_identity(path))
            entries = sorted(x for x in path.iterdir() if path != folder or x.name not in besides)
        except FileNotFoundError:
            continue  # gone since it was listed
        except OSError as error:
            if closed is None or path == folder:
                raise UserError(f"{shown(path)}: cannot be read: {error.strerror}") from error
            closed.append(path)
            continue
        for entry in entries:
            reason = why_skipped(entry)
            if reason == "a folder":
                (links if entry.is_symlink() else pending).append(entry)
            else:
                (skipped if reason else found).append(entry)
    return sorted(found), sorted(skipped)


def _identity(folder: pathlib.Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def state(path: str | os.PathLike) -> tuple[int, int, int] | None:
    """What a file is now: its size in bytes, and its content's and its entry's times of change, ns.

    None where there is none. Cameras without a clock, and copies, repeat the content's time.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def describe_skipped(paths: list[pathlib.Path]) -> str:
    """Counts and names what `find_images` skipped, with the reasons: one line."""
    reasons: dict[str, list[pathlib.Path]] = {}
    for path in paths:
        reason = why_skipped(path) or ("of predictions" if is_prediction(path) else "out of place")
        reason = "out of place or read already" if reason == "a folder" else reason
        reasons.setdefault(reason, []).append(path)
    return "; ".join(
        f"{len(some)} {reason}: {shown_first(some)}" for reason, some in reasons.items()
    )


# --- reading --------------------------------------------------------------------------------------


def encode_png(array: np.ndarray) -> bytes:
    """Returns `array`, uint8 `[h, w]` or `[h, w, 3]`, as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def read_picture(path: pathlib.Path, erase: bool = False) -> Picture:
    """Reads an image file, its levels as they are; `erase` blackens transparent pixels.

    Raises:
      UserError: the file is unreadable, truncated, or its pixels are out of range.
    """
    try:
        if not path.is_file():
            what = "a link that leads nowhere" if path.is_symlink() else "no such file"
            raise UserError("not a file" if path.exists() else what)
        data = path.read_bytes()
        if not data:
            raise ValueError("the file is empty")
        image = Image.open(io.BytesIO(data), formats=_formats())
        if image.format in _ENDS and _is_cut(data, _ENDS[image.format]):  # one colour, if decoded
            raise ValueError("it is cut short")
        levels = _levels(data, image, erase)
        about = _pages(image), deep.declared(data, image), deep.is_transparent(image)
        return Picture(levels, data, _is_plain(data, image), *about)
    except MemoryError as error:
        raise UserError(f"{shown(path)}: does not fit into memory") from error
    except UserError as error:
        raise UserError(f"{shown(path)}: {error}") from None
    except Exception as error:  # Pillow raises SyntaxError, ValueError, struct.error and more.
        raise UserError(
            f"{shown(path)}: not a readable image ({_reason(error)}); replace or remove the file"
        ) from error


def _is_cut(data: bytes, end: bytes) -> bool:
    """Whether a file goes over into zeros without its end: a copy that was interrupted."""
    filled = data.rstrip(b"\0")
    return len(data) - len(filled) >= _ZEROS and end not in filled[-_TRAILER:]


def is_deep(path: pathlib.Path) -> bool:
    """Whether an image file has more than 8 bits, by its header; False where it can't be read."""
    try:
        with Image.open(path, formats=_formats()) as image:
            return deep.is_deep(image)
    except Exception:  # Its reader says what is wrong.
        return False


def read_image(path: pathlib.Path, white: int = 0) -> tuple[bytes, tuple[int, int]]:
    """Reads an image file for a record.

    Args:
      path: the file.
      white: see `to_uint8`.

    Returns:
      The bytes of a PNG or JPEG file that decodes to uint8 `[h, w, 1 or 3]`, and `(h, w)`.
      Transparency is dropped.

    Raises:
      UserError: as `read_picture`.
    """
    picture = read_picture(path)
    return encode(picture, white), picture.levels.shape[:2]


def encode(picture: Picture, white: int = 0) -> bytes:
    """Returns what a record keeps of a picture: see `read_image`."""
    return picture.data if picture.is_plain else encode_png(to_uint8(picture.levels, white))


def read_array(path: pathlib.Path, white: int = 0) -> np.ndarray:
    """Reads an image file for prediction: the pixels that `read_image`'s bytes decode to.

    Returns:
      uint8 `[h, w, 3]`.

    Raises:
      UserError: as `read_picture`.
    """
    picture = read_picture(path)
    if picture.pages > 1:
        logging.log_first_n(
            logging.WARNING,
            "%s holds %d images: the first is read, as of each such file (said once)",
            1, shown(path), picture.pages,
        )  # fmt: skip
    if picture.transparent:
        logging.log_first_n(
            logging.WARNING,
            "%s has transparent pixels: their colours count, as in each such file (said once)",
            1, shown(path),
        )  # fmt: skip
    white = known_white(picture.levels, white, shown(path), picture.declared)
    return _rgb(to_uint8(picture.levels, white))


def known_white(levels: np.ndarray, white: int, name: str, declared: int = 0) -> int:
    """The white level of an image to predict: `white`, or a guess, which is said once.

    Args:
      levels: uint8 or uint16.
      white: of the images that were trained on; 0 if they had 8 bits: then a guess is better than a
        black image.
      name: of the image, for the message.
      declared: see `Picture`.
    """
    if white or levels.dtype == np.uint8:
        return white
    white = white_level(max(declared, int(levels.max(initial=0))))
    logging.log_first_n(
        logging.WARNING,
        "%s has more than 8 bits and no white level is known: level %d is taken for white, and of "
        "each such image its own guess (said once)", 1, name, white,
    )  # fmt: skip
    return white


def decode(data: bytes) -> np.ndarray:
    """Decodes a record's image: uint8 `[h, w, 3]`; the same as `read_array` of its file."""
    return _rgb(_levels(data, Image.open(io.BytesIO(data)), erase=False))


def white_level(highest: int) -> int:
    """The white of the camera with the fewest bits that has a level: 255, 1023, 4095, ... 65535."""
    return next(2**bits - 1 for bits in _BITS if highest < 2**bits)


def to_uint8(levels: np.ndarray, white: int = 0) -> np.ndarray:
    """Brings levels to 8 bits.

    Args:
      levels: of any shape; uint8, which stays as it is, or uint16.
      white: the level of a 16-bit image that becomes 255, e.g. 4095 of a 12-bit camera; higher ones
        are clipped. 0: the type's full range. With 2^k - 1 the k bits' highest 8 are kept.

    Returns:
      uint8, of the same shape.
    """
    levels = np.asarray(levels)
    if levels.dtype == np.uint8:
        return levels
    scaled = levels.astype(np.uint32) * 256 // ((white or 65535) + 1)
    return np.minimum(scaled, 255).astype(np.uint8)


def _rgb(array: np.ndarray) -> np.ndarray:
    return np.stack([array] * 3, axis=-1) if array.ndim == 2 else array


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "of no type, or no variant of it, that Pillow reads"
    first = (str(getattr(error, "strerror", None) or error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _is_plain(data: bytes, image: Image.Image) -> bool:
    # After loading: a rotation has been applied and is no longer in the EXIF data.
    if image.format == "PNG":
        depth, colour = data[24], data[25]  # of the header chunk, always the first
        return depth == 8 and colour in (0, 2) and not _turned(data)  # grey, RGB
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and not _turned(data)


def _turned(data: bytes) -> bool:
    return deep.is_turned(Image.open(io.BytesIO(data), formats=_formats()))


def _pages(image: Image.Image) -> int:
    # A camera's MPO holds its preview or depth besides.
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _levels(data: bytes, image: Image.Image, erase: bool) -> np.ndarray:
    """Decodes the first page; see `upright`."""
    if image.format == "PPM" and deep.is_deep(image):
        return deep.ppm_levels(data, image)
    if deep.is_deep(image) and image.mode in ("RGB", "RGBA") and not deep.is_scrambled(image):
        levels = deep.colour_levels(data, image)
        if levels.shape[-1] == 4 and erase:
            levels[levels[..., 3] == 0] = 0
        return levels[..., :3]
    return upright(image, erase)


def upright(image: Image.Image, erase: bool = False) -> np.ndarray:
    """Returns the levels of Pillow's image, turned as its EXIF data says.

    Args:
      image: of any mode.
      erase: blacken transparent pixels; else transparency is dropped.

    Returns:
      uint8 or uint16, `[h, w]` or `[h, w, 3]`.

    Raises:
      UserError: the pixels do not fit; without a name.
    """
    if deep.is_scrambled(image):
        raise UserError(
            "16-bit TIFF whose colours are in planes of their own (PlanarConfiguration 2) is not "
            "read; save the file with interleaved colours, or as PNG"
        )
    inverted = deep.is_inverted(image)
    image = deep.turn(image)
    if image.mode in deep.GREY:
        levels = np.asarray(image).astype(np.int64)
        if levels.min(initial=0) < 0 or levels.max(initial=0) > 65535:
            raise UserError(
                f"pixels from {levels.min()} to {levels.max()} do not fit 16 bits; save the file "
                "as 16-bit grey"
            )
        return (65535 - levels if inverted else levels).astype(np.uint16)
    mode = "L" if image.mode in ("1", "L") else "RGB"
    if erase and (image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    try:
        if image.mode != "F":
            return np.asarray(image if image.mode == mode else image.convert(mode))
    except ValueError:
        pass
    what = "floating-point pixels" if image.mode == "F" else f"pixels of Pillow's mode {image.mode}"
    raise UserError(f"{what} have no known white; save the file as 8-bit RGB or 16-bit grey")


# --- sizes ----------------------------------------------------------------------------------------


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Brings an image to the network's size: bilinear, antialiased, to the nearest level.

    Args:
      image: uint8 `[h, w, 3]`.
      size: (height, width) in pixels.

    Returns:
      uint8 `[height, width, 3]`.
    """
    if image.shape[:2] == tuple(size):
        return image
    # One side after the other: versions of Pillow differ in which they would take first.
    wide = Image.fromarray(image).resize((size[1], len(image)), Image.Resampling.BILINEAR)
    return np.asarray(wide.resize(size[::-1], Image.Resampling.BILINEAR))
