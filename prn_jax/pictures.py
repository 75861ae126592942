"""Pictures one would rather look at than read about: contact sheets, outlines, heat maps."""

import io
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from scipy import ndimage

from prn_jax import disk, images
from prn_jax.splits import Images

Row = tuple[str, list[tuple[np.ndarray, str]]]

_PER_ROW = 4  # images of each defect in a sheet of results
_BAND = 256  # rows of an image that are drawn at a time
_OUTLINE = (255, 0, 200)  # seldom the colour of a product
_BACKGROUND, _TEXT = (32, 33, 36), (228, 228, 228)
# Dark to light, as perceptual colour maps go: violet, red, orange, yellow.
_HEAT = np.array([[10, 8, 40], [110, 20, 120], [215, 60, 70], [250, 150, 30], [252, 250, 170]])
_HEAT_STEPS = np.round(
    np.stack(
        [np.interp(np.linspace(0, 4, 256), np.arange(5), channel) for channel in _HEAT.T], axis=-1
    )
).astype(np.uint8)


def outline(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draws a mask's contour, just outside of it, on uint8 [h, w, 3]; mask is [h, w]."""
    mask = np.asarray(mask) > 0
    width = max(1, round(min(mask.shape) / 128))
    picture = image.copy()
    picture[ndimage.binary_dilation(mask, iterations=width) & ~mask] = _OUTLINE
    return picture


def heat(values: np.ndarray) -> np.ndarray:
    """Colours of a map [h, w] in [0, 1], in 256 steps: uint8 [h, w, 3]."""
    return _HEAT_STEPS[_level(values)]


def overlay(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A heat map over an image: the higher the value, the less of the image shows."""
    laid = np.empty(image.shape, np.uint8)
    for start in range(0, len(image), _BAND):  # a large image's floats would fill the memory
        rows = slice(start, start + _BAND)
        weight = (0.25 + 0.5 * np.clip(values[rows], 0, 1, dtype=np.float32))[..., None]
        grey = image[rows].mean(-1, keepdims=True, dtype=np.float32)
        laid[rows] = np.round(grey + weight * (heat(values[rows]) - grey))
    return laid


def _level(values: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(values, 0, 1, dtype=np.float32)).astype(np.uint8)


def contact_sheet(rows: Sequence[Row], cell: int = 160) -> Image.Image:
    """Lays out rows of captioned images, each row under its title.

    Args:
      rows: (title, [(image uint8 [h, w, 3], caption), ...]).
      cell: the longer side of each image in pixels.
    """
    font, small = ImageFont.load_default(16), ImageFont.load_default(12)
    gap, title_height = 8, 26
    sizes = [_fit(image.shape[:2], cell) for _, cells in rows for image, _ in cells]
    captions = [line for _, cells in rows for _, c in cells for line in c.split("\n")]
    # Beside narrow images there is room for what is below them.
    needed = min(cell, math.ceil(max(map(small.getlength, captions), default=0)))
    wide = max(needed, max((w for _, w in sizes), default=cell))
    lines = max((c.count("\n") + 1 for _, cells in rows for _, c in cells if c), default=0)
    heights = [
        title_height + max((_fit(i.shape[:2], cell)[0] for i, _ in cells), default=0)
        + 15 * lines + gap
        for _, cells in rows
    ]  # fmt: skip
    columns = max((len(cells) for _, cells in rows), default=1)
    titles = math.ceil(max((font.getlength(title) for title, _ in rows), default=0))
    size = (max(320, columns * (wide + gap) + gap, titles + 2 * gap), sum(heights) + gap)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = gap
    for (title, cells), height in zip(rows, heights):
        draw.text((gap, top), title, _TEXT, font)
        for number, (image, caption) in enumerate(cells):
            high, broad = _fit(image.shape[:2], cell)
            left, upper = gap + number * (wide + gap), top + title_height
            picture = Image.fromarray(image).resize((broad, high), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left, upper))
            for i, line in enumerate(caption.split("\n")):
                while small.getlength(line) > wide:
                    line = line[:-1]
                draw.text((left, upper + high + 2 + 15 * i), line, _TEXT, small)
        top += height
    return sheet


def results_sheet(test: Images, maps: np.ndarray, scores: np.ndarray) -> Image.Image:
    """An evaluation at a glance: per defect the lowest scores first, of the normals the highest.

    Args:
      test: the images, [n]; of each defect four are shown, with the mask's outline and the map.
      maps: anomaly maps, float [n, h, w] in [0, 1].
      scores: [n].
    """
    rows, labels = [], test.label
    for defect in sorted(set(test.defect), key=lambda name: (name != "good", name)):
        chosen = [i for i, name in enumerate(test.defect) if name == defect]
        anomalous = bool(labels[chosen[0]])
        chosen.sort(key=lambda i: float(scores[i]) if anomalous else -float(scores[i]))
        cells = []
        for i in chosen[:_PER_ROW]:
            cells.append((outline(test.image[i], test.mask[i]), test.id[i].split("/")[-1]))
            cells.append((overlay(test.image[i], maps[i]), f"score {scores[i]:.3f}"))
        hardest = "lowest" if anomalous else "highest"
        rows.append((f"{defect}: the {hardest} scores of {len(chosen)}", cells))
    return contact_sheet(rows)


def save_png(path: epath.PathLike, image: Image.Image, is_prediction: bool = False) -> None:
    """Writes a PNG, complete or not at all; `is_prediction` lets `is_prediction` know it again."""
    buffer = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    if is_prediction:
        info.add_text("Description", images.PREDICTION)
    image.save(buffer, "PNG", pnginfo=info)
    disk.write_file(epath.Path(path), buffer.getvalue())


def save_map(path: pathlib.Path, values: np.ndarray) -> None:
    """Writes an anomaly map, float32 [h, w], complete or not at all; `path` ends in .tiff or .npy.

    A TIFF file has one channel of 32-bit floats, uncompressed, as MVTec AD's evaluation reads it.
    """
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, values)
    else:
        Image.fromarray(values).save(
            buffer, "TIFF", tiffinfo={images.DESCRIPTION: images.PREDICTION}
        )
    disk.write_file(epath.Path(path), buffer.getvalue())


def _fit(shape: tuple[int, int], cell: int) -> tuple[int, int]:
    """(height, width) at which the longer side is `cell`."""
    scale = cell / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
