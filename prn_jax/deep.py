"""Images of more than 8 bits per channel, which Pillow reads in part, and what else a file says."""

import io
import sys

import numpy as np
from PIL import Image, ImageOps

# Pillow's modes of grey of more than 8 bits.
GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")
# TIFF's tags.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE_VALUE, _PLANES = 258, 262, 281, 284
_ORIENTATION = 274  # EXIF's


def is_deep(image: Image.Image) -> bool:
    """Whether an image that was opened, but not loaded, has more than 8 bits per channel."""
    if image.format == "PPM" and image.mode != "F":
        return _ppm_maximum(image) > 255
    # BGR;16 has 16 bits for all of its channels together.
    deep = ";16" in _raw_mode(image) and not _raw_mode(image).startswith("BGR;")
    return image.mode in GREY or (deep and image.mode != "CMYK")


def is_cut(image: Image.Image) -> bool:
    """Whether Pillow itself cuts or stretches the levels of an image that is not loaded yet."""
    of_levels = image.format == "PPM" or image.mode not in GREY
    return bool(getattr(image, "tile", ())) and of_levels and is_deep(image)


def is_scrambled(image: Image.Image) -> bool:
    """Whether it is TIFF with each 16-bit colour in a plane of its own, which Pillow misreads."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits = tags.get(_BITS_PER_SAMPLE, ())
    return tags.get(_PLANES) == 2 and len(bits) > 1 and max(bits) > 8


def is_inverted(image: Image.Image) -> bool:
    """Whether it is TIFF of more than 8 bits whose 0 is white, which Pillow does not turn over."""
    return image.format == "TIFF" and is_deep(image) and image.tag_v2.get(_PHOTOMETRIC) == 0


def is_turned(image: Image.Image) -> bool:
    """Whether its EXIF data says that it does not lie upright."""
    return image.getexif().get(_ORIENTATION, 1) != 1


def turn(image: Image.Image) -> Image.Image:
    """Decodes an image and turns it as its EXIF data says; one that lies upright isn't copied."""
    image.load()  # Everything: a truncated file shows only now, as may EXIF data at its end.
    return ImageOps.exif_transpose(image) if is_turned(image) else image


def declared(data: bytes, image: Image.Image) -> int:
    """The highest level that the file says it may hold; 0 where it doesn't say."""
    if image.format == "PNG":
        highest = max((2**bits - 1 for bits in _png_chunk(data, b"sBIT")), default=0)
    elif image.format == "TIFF":
        values = image.tag_v2.get(_MAX_SAMPLE_VALUE, 0)
        highest = int(max(values) if isinstance(values, tuple) else values)
        highest = highest or 2 ** max(image.tag_v2.get(_BITS_PER_SAMPLE, (16,))) - 1
    else:
        highest = _ppm_maximum(image) if image.format == "PPM" and image.tile else 0
    return highest if highest < 65535 else 0  # The type's own range says nothing.


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


def colour_levels(data: bytes, image: Image.Image) -> np.ndarray:
    """16-bit colour, uint16 `[h, w, 3 or 4]`, of which Pillow gives the high bytes only.

    So it is decoded twice, the second time as if the bytes were the other way round.
    """
    native = "B" if sys.byteorder == "little" else "L"
    other = {";16B": ";16L", ";16L": ";16B", ";16N": f";16{native}"}
    high, low = image, Image.open(io.BytesIO(data), formats=(image.format,))
    if _raw_mode(image) == "LA;16B":  # Bytes: grey's high and low, alpha's high and low.
        image.tile = [tile._replace(args="RGBA") for tile in image.tile]
        levels = np.asarray(turn(image)).astype(np.uint16)
        grey, alpha = (levels[..., i] << 8 | levels[..., i + 1] for i in (0, 2))
        return np.stack([grey, grey, grey, alpha], axis=-1)

    def swapped(arguments):
        if isinstance(arguments, str):
            return arguments[:-4] + other[arguments[-4:]]
        return (swapped(arguments[0]), *arguments[1:])

    low.tile = [tile._replace(args=swapped(tile.args)) for tile in low.tile]
    high, low = (np.asarray(turn(x)).astype(np.uint16) for x in (high, low))
    return high << 8 | low


def _raw_mode(image: Image.Image) -> str:
    arguments = image.tile[0].args if image.tile else ""
    return arguments if isinstance(arguments, str) else str((arguments or ("",))[0])


def _ppm_maximum(image: Image.Image) -> int:
    tile = image.tile[0]
    if tile.codec_name == "raw":
        return 65535 if ";16" in _raw_mode(image) else 255
    return tile.args[-1]


def ppm_levels(data: bytes, image: Image.Image) -> np.ndarray:
    """PGM and PPM of more than 8 bits, which Pillow would stretch, or cut to 8 bits."""
    bands = 3 if image.mode == "RGB" else 1
    count, offset = image.width * image.height * bands, image.tile[0].offset
    if image.tile[0].codec_name == "ppm_plain":
        levels = np.array(data[offset:].split()[:count], np.uint16)
    else:
        levels = np.frombuffer(data, ">u2", count, offset).astype(np.uint16)
    shape = (image.height, image.width)
    return levels.reshape(*shape, 3) if bands == 3 else levels.reshape(shape)


def is_transparent(image: Image.Image) -> bool:
    """Whether an image has transparent pixels."""
    if not image.has_transparency_data:
        return False
    return image.convert("RGBA").getchannel("A").getextrema()[0] < 255
