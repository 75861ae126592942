"""Image and mask files of any kind, brought to what a record holds.

Records keep an 8-bit RGB or grey PNG or JPEG byte for byte. Everything else that Pillow opens (BMP,
TIFF, 16-bit, CMYK, palette, alpha, EXIF rotation, ...) is decoded and encoded anew as an 8-bit RGB
PNG, so that TensorFlow can decode every record.
"""

import io
import pathlib

import numpy as np
from PIL import Image, ImageOps

from prn_jax.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

_ORIENTATION = 0x0112  # the EXIF tag
_WIDE = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of 16-bit grey


def encode_png(array: np.ndarray) -> bytes:
    """Returns `array`, uint8 `[h, w]` or `[h, w, 3]`, as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def read_image(path: pathlib.Path) -> tuple[bytes, tuple[int, int]]:
    """Reads an image file for a record.

    Args:
      path: the file.

    Returns:
      The bytes of a PNG or JPEG file that decodes to uint8 `[h, w, 1 or 3]`, and `(h, w)`. 16-bit
      images keep their high byte; transparency is dropped.

    Raises:
      UserError: the file is unreadable, truncated, or has floating-point pixels.
    """
    data, image = _open(path)
    if _is_plain(data, image):
        return data, (image.height, image.width)
    array = _upright(path, image)
    if array.ndim == 2:
        array = np.stack([array] * 3, axis=-1)
    return encode_png(array), array.shape[:2]


def read_array(path: pathlib.Path) -> np.ndarray:
    """Reads an image file for prediction: the pixels that `read_image`'s bytes decode to.

    Returns:
      uint8 `[h, w, 3]`.

    Raises:
      UserError: as `read_image`.
    """
    array = _upright(path, _open(path)[1])
    return np.stack([array] * 3, axis=-1) if array.ndim == 2 else array


def read_mask(path: pathlib.Path) -> np.ndarray:
    """Reads a mask file.

    A pixel counts as defective where its brightest channel reaches half of the full range. Files
    that nowhere get so bright (values 0 and 1, or class numbers) count wherever they are not 0.

    Returns:
      uint8 `[h, w]` in {0, 255}.

    Raises:
      UserError: the file is unreadable, truncated, or has floating-point pixels.
    """
    _, image = _open(path)
    full = 65536 if image.mode in _WIDE else 256
    array = _upright(path, image, keep_wide=True)
    if array.ndim == 3:
        array = array.max(axis=-1)
    threshold = full // 2 if array.max(initial=0) >= full // 2 else 1
    return np.where(array >= threshold, 255, 0).astype(np.uint8)


def _open(path: pathlib.Path) -> tuple[bytes, Image.Image]:
    try:
        data = path.read_bytes()
        image = Image.open(io.BytesIO(data))
        image.load()  # Decodes everything: a truncated file shows only now.
    except Exception as error:  # Pillow raises SyntaxError, ValueError, struct.error and more.
        reason = str(error).replace(f"{path}", "").splitlines() or [""]
        raise UserError(
            f"{path}: not a readable image ({type(error).__name__}: {reason[0]}); "
            "replace or remove the file"
        ) from error
    return data, image


def _is_plain(data: bytes, image: Image.Image) -> bool:
    if image.getexif().get(_ORIENTATION, 1) != 1:
        return False
    if image.format == "PNG":
        depth, colour = data[24], data[25]  # of the header chunk, always the first
        return depth == 8 and colour in (0, 2)  # grey, RGB
    return image.format == "JPEG" and image.mode in ("L", "RGB")


def _upright(path: pathlib.Path, image: Image.Image, keep_wide: bool = False) -> np.ndarray:
    """Returns `[h, w]` or `[h, w, 3]` with EXIF rotation applied, uint8 unless `keep_wide`."""
    image = ImageOps.exif_transpose(image)
    if image.mode in _WIDE:
        array = np.asarray(image).astype(np.int64)
        if array.min(initial=0) >= 0 and array.max(initial=0) < 65536:
            return array if keep_wide else (array >> 8).astype(np.uint8)
    elif image.mode != "F":
        try:
            if keep_wide and image.mode in ("LA", "PA", "RGBA"):  # Transparent is not marked.
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            return np.asarray(image if image.mode == "L" else image.convert("RGB"))
        except ValueError:
            pass
    raise UserError(
        f"{path}: pixels of Pillow's mode {image.mode} do not fit 8 or 16 bits; "
        "save the file as 8-bit RGB"
    )
