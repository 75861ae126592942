"""Image and mask files of any kind, brought to what a record holds, and to the network's size.

Which files are images, how they are decoded and how they are resized is decided here alone, for
training, evaluation and prediction. Records keep an 8-bit RGB or grey PNG or JPEG byte for byte.
Everything else that Pillow opens (BMP, TIFF, 16-bit, CMYK, palette, alpha, EXIF rotation, ...) is
decoded and encoded anew as an 8-bit RGB PNG.
"""

import dataclasses
import functools
import io
import pathlib
import sys

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from prn_jax.errors import UserError, shown

# The files are the user's own, however large they and their metadata are.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30

# What Pillow opens, but as a preview of a document, an icon, a film, or only with more software.
_NO_PICTURES = frozenset({
    "BUFR", "CUR", "EPS", "FLI", "GRIB", "HDF5", "ICNS", "ICO", "IPTC", "MPEG", "PCD", "PSD", "WMF",
})  # fmt: skip
# Files that operating systems and programs put among the images.
_JUNK = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"})

_WIDE = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of more than 8 bits of grey
_BITS = (8, 10, 12, 14, 16)  # that cameras have
_MAX_SAMPLE_VALUE = 281  # TIFF's tag


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image file as it was found, turned upright.

    Attributes:
      levels: uint8 or uint16, [h, w] or [h, w, 3].
      data: the file's bytes.
      is_plain: whether TensorFlow, too, decodes `data` to `levels`: 8-bit grey or RGB PNG or JPEG.
      pages: images in the file; `levels` is the first.
      declared: the highest level that the file says it may hold; 0 where it doesn't say.
    """

    levels: np.ndarray
    data: bytes
    is_plain: bool
    pages: int
    declared: int


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
    if path.is_dir():
        return "a folder"
    if path.suffix.lower() not in extensions():
        return "no type of image that Pillow reads"
    # A link that leads nowhere is an image that can't be read, which its reader says.
    return "" if path.is_file() or path.is_symlink() else "not a file but a device or a pipe"


def find_images(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Finds all image files below a folder.

    Links to folders are followed, after the folders themselves, and none is read twice.

    Args:
      folder: where to look; where it does not exist both lists are empty.

    Returns:
      The image files, and what was skipped: files that are none, hidden folders (as a whole), and
      links to folders that were read already; both sorted.

    Raises:
      UserError: a folder can't be read.
    """
    found, skipped, read = [], [], set()
    pending = [folder] if folder.is_dir() else []
    links: list[pathlib.Path] = []
    while pending or links:
        path = pending.pop() if pending else links.pop(0)
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in read:
                skipped.append(path)
                continue
            read.add((status.st_dev, status.st_ino))
            entries = sorted(path.iterdir())
        except OSError as error:
            raise UserError(f"{shown(path)}: cannot be read: {error.strerror}") from error
        for entry in entries:
            reason = why_skipped(entry)
            if reason == "a folder":
                (links if entry.is_symlink() else pending).append(entry)
            else:
                (skipped if reason else found).append(entry)
    return sorted(found), sorted(skipped)


def describe(paths: list[pathlib.Path], most: int = 5) -> str:
    """Counts and names what `find_images` skipped, with the reasons: one line."""
    reasons: dict[str, list[pathlib.Path]] = {}
    for path in paths:
        # A folder is among the skipped ones because it was read already.
        reason = why_skipped(path)
        reasons.setdefault("read already" if reason == "a folder" else reason, []).append(path)
    return "; ".join(
        f"{len(some)} {reason}: {', '.join(map(shown, some[:most]))}"
        f"{', ...' if len(some) > most else ''}"
        for reason, some in reasons.items()
    )


# --- reading --------------------------------------------------------------------------------------


def encode_png(array: np.ndarray) -> bytes:
    """Returns `array`, uint8 `[h, w]` or `[h, w, 3]`, as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def read_picture(path: pathlib.Path) -> Picture:
    """Reads an image file, its levels as they are.

    Raises:
      UserError: the file is unreadable, truncated, or its pixels are out of range.
    """
    return _read(path, erase=False)


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
    return picture.data if picture.is_plain else encode_png(_rgb(to_uint8(picture.levels, white)))


def read_array(path: pathlib.Path, white: int = 0) -> np.ndarray:
    """Reads an image file for prediction: the pixels that `read_image`'s bytes decode to.

    Returns:
      uint8 `[h, w, 3]`.

    Raises:
      UserError: as `read_picture`.
    """
    return _rgb(to_uint8(read_picture(path).levels, white))


def decode(data: bytes) -> np.ndarray:
    """Decodes a record's image: uint8 `[h, w, 3]`; the same as `read_array` of its file."""
    return _rgb(_levels(data, Image.open(io.BytesIO(data)), erase=False))


def read_mask(path: pathlib.Path) -> np.ndarray:
    """Reads a mask file.

    A pixel counts as defective where its brightest channel reaches half of the full range. Files
    that nowhere get so bright (values 0 and 1, or class numbers) count wherever they are not 0.
    Transparent pixels are not marked.

    Returns:
      uint8 `[h, w]` in {0, 255}.

    Raises:
      UserError: as `read_picture`.
    """
    levels = _read(path, erase=True).levels
    if levels.ndim == 3:
        levels = levels.max(axis=-1)
    half = 128 if levels.dtype == np.uint8 else 32768
    marked = levels >= half if levels.max(initial=0) >= half else levels > 0
    return np.where(marked, 255, 0).astype(np.uint8)


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


def _read(path: pathlib.Path, erase: bool) -> Picture:
    if not path.is_file():
        what = "a link that leads nowhere" if path.is_symlink() else "no such file"
        raise UserError(f"{shown(path)}: {'not a file' if path.exists() else what}")
    try:
        data = path.read_bytes()
        if not data:
            raise ValueError("the file is empty")
        image = Image.open(io.BytesIO(data), formats=_formats())
        levels = _levels(data, image, erase)
        return Picture(levels, data, _is_plain(data, image), _pages(image), _declared(data, image))
    except MemoryError as error:
        raise UserError(f"{shown(path)}: does not fit into memory") from error
    except UserError as error:
        raise UserError(f"{shown(path)}: {error}") from None
    except Exception as error:  # Pillow raises SyntaxError, ValueError, struct.error and more.
        raise UserError(
            f"{shown(path)}: not a readable image ({_reason(error)}); replace or remove the file"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "Pillow knows no such type"
    first = (str(getattr(error, "strerror", None) or error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _is_plain(data: bytes, image: Image.Image) -> bool:
    # After loading: a rotation has been applied and is no longer in the EXIF data.
    if image.format == "PNG":
        depth, colour = data[24], data[25]  # of the header chunk, always the first
        return depth == 8 and colour in (0, 2) and not _turned(data)  # grey, RGB
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and not _turned(data)


def _turned(data: bytes) -> bool:
    return Image.open(io.BytesIO(data), formats=_formats()).getexif().get(0x0112, 1) != 1


def _pages(image: Image.Image) -> int:
    # A camera's MPO holds its preview or depth besides.
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _declared(data: bytes, image: Image.Image) -> int:
    """The highest level that the file says it may hold; 0 where it doesn't say."""
    if image.format == "PNG":
        return max((2**bits - 1 for bits in _png_chunk(data, b"sBIT")), default=0)
    if image.format == "TIFF":
        bits = max(image.tag_v2.get(258, (1,)))
        highest = image.tag_v2.get(_MAX_SAMPLE_VALUE, 0)
        highest = max(highest) if isinstance(highest, tuple) else highest
        return int(highest) or (2**bits - 1 if bits < 16 else 0)
    return 0


def _png_chunk(data: bytes, name: bytes) -> bytes:
    position = 8
    while position + 8 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4]), data[position + 4 :][:4]
        if kind == name:
            return data[position + 8 : position + 8 + length]
        if kind == b"IDAT":
            break
        position += length + 12
    return b""


def _levels(data: bytes, image: Image.Image, erase: bool) -> np.ndarray:
    """Decodes the first page; see `upright`."""
    if image.format == "PPM" and image.tile[0].codec_name != "pfm" and _ppm_maximum(image) > 255:
        return _ppm_levels(data, image)
    if ";16" in _raw_mode(image) and image.mode in ("RGB", "RGBA"):
        levels = _deep_colour(data, image)
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
    image.load()  # Decodes everything: a truncated file shows only now.
    image = ImageOps.exif_transpose(image)
    if image.mode in _WIDE:
        levels = np.asarray(image).astype(np.int64)
        if levels.min(initial=0) < 0 or levels.max(initial=0) > 65535:
            raise UserError(
                f"pixels from {levels.min()} to {levels.max()} do not fit 16 bits; save the file "
                "as 16-bit grey"
            )
        return levels.astype(np.uint16)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if erase and image.mode in ("LA", "PA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    try:
        if image.mode != "F":
            return np.asarray(image.convert("RGB"))
    except ValueError:
        pass
    raise UserError(
        f"pixels of Pillow's mode {image.mode} do not fit 8 or 16 bits; save the file as 8-bit RGB "
        "or 16-bit grey"
    )


def _raw_mode(image: Image.Image) -> str:
    arguments = image.tile[0].args if image.tile else ""
    return arguments if isinstance(arguments, str) else str((arguments or ("",))[0])


def _deep_colour(data: bytes, image: Image.Image) -> np.ndarray:
    """16-bit colour, uint16 `[h, w, 3 or 4]`, of which Pillow gives the high bytes only.

    So it is decoded twice, the second time as if the bytes were the other way round.
    """
    native = "B" if sys.byteorder == "little" else "L"
    other = {";16B": ";16L", ";16L": ";16B", ";16N": f";16{native}"}
    high, low = image, Image.open(io.BytesIO(data), formats=_formats())
    if _raw_mode(image) == "LA;16B":  # Bytes: grey's high and low, alpha's high and low.
        image.tile = [tile._replace(args="RGBA") for tile in image.tile]
        levels = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)
        grey, alpha = (levels[..., i] << 8 | levels[..., i + 1] for i in (0, 2))
        return np.stack([grey, grey, grey, alpha], axis=-1)

    def swapped(arguments):
        if isinstance(arguments, str):
            return arguments[:-4] + other[arguments[-4:]]
        return (swapped(arguments[0]), *arguments[1:])

    low.tile = [tile._replace(args=swapped(tile.args)) for tile in low.tile]
    high, low = (np.asarray(ImageOps.exif_transpose(x)).astype(np.uint16) for x in (high, low))
    return high << 8 | low


def _ppm_maximum(image: Image.Image) -> int:
    tile = image.tile[0]
    if tile.codec_name == "raw":
        return 65535 if ";16" in _raw_mode(image) else 255
    return tile.args[-1]


def _ppm_levels(data: bytes, image: Image.Image) -> np.ndarray:
    """PGM and PPM of more than 8 bits, which Pillow would stretch, or cut to 8 bits."""
    bands = 3 if image.mode == "RGB" else 1
    count, offset = image.width * image.height * bands, image.tile[0].offset
    if image.tile[0].codec_name == "ppm_plain":
        levels = np.array(data[offset:].split()[:count], np.uint16)
    else:
        levels = np.frombuffer(data, ">u2", count, offset).astype(np.uint16)
    shape = (image.height, image.width)
    return levels.reshape(*shape, 3) if bands == 3 else levels.reshape(shape)


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
    resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Brings a mask to the network's size: marked where more than half of a pixel's area is.

    Args:
      mask: `[h, w]`, anything but 0 is marked.
      size: (height, width) in pixels.

    Returns:
      uint8 `[height, width]` in {0, 1}.
    """
    share = Image.fromarray((mask != 0).astype(np.float32))
    if mask.shape != tuple(size):
        share = share.resize(size[::-1], Image.Resampling.BOX)
    return (np.asarray(share) > 0.5).astype(np.uint8)
