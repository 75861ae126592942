"""Tiny data sets in the official layouts, for tests."""

import pathlib

import numpy as np
from PIL import Image

SIZE = (12, 16)  # height, width


def draw(seed: int, size: tuple[int, int] = SIZE, channels: int = 3) -> np.ndarray:
    """Returns a random image, uint8 `[h, w, 3]`, or `[h, w]` for one channel."""
    shape = size if channels == 1 else (*size, channels)
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def draw_mask(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Returns a mask with one rectangle, uint8 `[h, w]` in {0, 255}."""
    rng = np.random.RandomState(seed)
    mask = np.zeros(size, np.uint8)
    top, left = rng.randint(size[0] - 4), rng.randint(size[1] - 4)
    mask[top : top + rng.randint(2, 5), left : left + rng.randint(2, 5)] = 255
    return mask


def save(path: pathlib.Path, array: np.ndarray, **options) -> np.ndarray:
    """Writes an array as an image file, its folders too, and returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return array


def _make(
    folder: pathlib.Path,
    normal: str,
    defects: dict[str, int],
    train: int,
    good: int,
    image_ext: str,
    mask_name: str,
    channels: int,
    size: tuple[int, int],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    written = {}
    groups = [("train", normal, train), ("test", normal, good)]
    groups += [("test", defect, number) for defect, number in defects.items()]
    for split, name, number in groups:
        for i in range(number):
            seed = len(written)
            id_ = f"{split}/{name}/{i:03d}"
            image = save(folder / f"{id_}.{image_ext}", draw(seed, size, channels))
            mask = np.zeros(size, np.uint8)
            if name != normal:
                path = folder / "ground_truth" / name / mask_name.format(f"{i:03d}")
                mask = save(path, draw_mask(seed, size))
            written[id_] = image, mask
    return written


def make_mvtec(
    root: pathlib.Path,
    category: str = "bottle",
    *,
    defects: dict[str, int] | None = None,
    train: int = 4,
    good: int = 2,
    image_ext: str = "png",
    channels: int = 3,
    size: tuple[int, int] = SIZE,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Makes one category in MVTec AD's layout; returns `{id: (image, mask)}`.

    It is `folder`'s layout too, whose products may have no defects.
    """
    defects = {"broken_large": 3, "contamination": 2} if defects is None else defects
    return _make(
        root / category, "good", defects, train, good, image_ext, "{}_mask.png", channels, size
    )


def make_btad(
    root: pathlib.Path, category: str = "01", *, train: int = 4, good: int = 2, defective: int = 3
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Makes one category of BeanTech AD; returns `{id: (image, mask)}`."""
    image_ext = "png" if category == "02" else "bmp"
    mask_name = "{}.bmp" if category == "03" else "{}.png"
    folder, defects = root / category, {"ko": defective}
    return _make(folder, "ok", defects, train, good, image_ext, mask_name, 3, SIZE)


def make_dagm(
    root: pathlib.Path, category: str = "Class1", *, normal: int = 4, defective: int = 2
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Makes one grey class of DAGM 2007, the defective images first; returns `{id: ...}`."""
    written = {}
    for part in ("Train", "Test"):
        for i in range(1, normal + defective + 1):
            seed = len(written)
            folder = root / category / part
            image = save(folder / f"{i:04d}.PNG", draw(seed, channels=1))
            mask = np.zeros(SIZE, np.uint8)
            if i <= defective:
                mask = save(folder / "Label" / f"{i:04d}_label.PNG", draw_mask(seed))
            written[f"{part}/{i:04d}"] = image, mask
        (root / category / part / "Label" / "Labels.txt").write_text("1\n")
    return written


def make_kolektor_sdd2(
    root: pathlib.Path, *, normal: int = 4, defective: int = 2
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Makes KolektorSDD2, images of differing sizes; returns `{id: (image, mask)}`."""
    written = {}
    for split in ("train", "test"):
        for i in range(normal + defective):
            seed = len(written)
            id_, size = f"{split}/{10000 + i}", (30 + i, 12)
            mask = draw_mask(seed, size) if i < defective else np.zeros(size, np.uint8)
            save(root / f"{id_}_GT.png", mask)
            written[id_] = save(root / f"{id_}.png", draw(seed, size)), mask
    return written
