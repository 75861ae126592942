"""The demo: scikit-image's photographs of gravel, brick and grass, with defects drawn on them.

No download: the photographs (CC0) come with scikit-image. Normal images are crops; the crops for
training and those for testing come from two parts of the photograph that a gap divides. The defects
(scratches, stains, holes, missing pieces) are drawn here, by code that shares nothing with
`prn_jax/synthesis`: what the demo's test set holds is not what the synthesis makes.
"""

import hashlib
import importlib.util
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from scipy import ndimage

from prn_jax import images
from prn_jax.datasets import base
from prn_jax.errors import UserError

SIZE = 128  # pixels, of a crop's sides
# Columns of the photograph's 512.
_PARTS = {"train": (0, 312), "test": (320, 512)}
_NORMALS = {"train": 60, "test": 20}
_DEFECTIVE = 10  # of each kind
# Grey levels (of 255) from which a change counts as visible.
_VISIBLE = 10
# What a defect has at least, or it's drawn again: pixels, and their mean change in grey levels.
_MIN_AREA = 30
_MIN_CHANGE = 35


def _smooth_noise(rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Returns Gaussian noise `[SIZE, SIZE]` of that correlation length, mean 0, deviation 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _blend(image: np.ndarray, colour: np.ndarray | float, alpha: np.ndarray) -> np.ndarray:
    return image * (1 - alpha) + colour * alpha


def _grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:SIZE, :SIZE]
    return y.astype(float), x.astype(float)


def scratch(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A bright, slightly bent line with a dark edge on one side."""
    length, angle = rng.uniform(35, 110), rng.uniform(0, np.pi)
    along = np.array([np.sin(angle), np.cos(angle)])
    across = np.array([along[1], -along[0]])
    middle = rng.uniform(0.25, 0.75, size=2) * SIZE
    t = np.linspace(-1, 1, 400)[:, None]
    bend = rng.uniform(-0.15, 0.15) * length
    curve = middle + t * along * length / 2 + (1 - t**2) * across * bend
    width = rng.uniform(1.2, 2.6) * (1 - 0.6 * t[:, 0] ** 4)  # thinner towards the ends
    y, x = _grid()
    distance = np.full(image.shape, np.inf)
    side = np.zeros(image.shape)
    for (cy, cx), w in zip(curve, width, strict=True):
        d = np.hypot(y - cy, x - cx) - w
        nearer = d < distance
        distance = np.where(nearer, d, distance)
        side = np.where(nearer, (y - cy) * across[0] + (x - cx) * across[1], side)
    core = np.clip(0.7 - distance, 0, 1)
    edge = np.clip(1.8 - distance, 0, 1) * (side > 0) * (1 - core)
    glint = 232 + 14 * _smooth_noise(rng, 2)
    return _blend(_blend(image, 25.0, 0.7 * edge), glint, 0.92 * core)


def stain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A translucent dark blot with a ragged, soft edge and a darker rim, as oil leaves."""
    y, x = _grid()
    cy, cx = rng.uniform(0.2, 0.8, size=2) * SIZE
    radius, angle, squash = rng.uniform(13, 25), rng.uniform(0, np.pi), rng.uniform(0.6, 1)
    u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / squash
    inside = radius - np.hypot(u, v) + 0.22 * radius * _smooth_noise(rng, 6)
    alpha = np.clip(inside / rng.uniform(3, 6), 0, 1)
    rim = alpha * np.exp(-np.square((inside - 5) / 3))
    strength = rng.uniform(0.5, 0.68) * alpha + 0.15 * rim
    return _blend(image, 18.0, strength + 0.05 * alpha * _smooth_noise(rng, 3))


def hole(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One to three round dark holes, each lit on the lower right of its rim."""
    y, x = _grid()
    for _ in range(rng.integers(1, 4)):
        cy, cx = rng.uniform(0.12, 0.88, size=2) * SIZE
        radius, squash = rng.uniform(4.5, 11), rng.uniform(0.75, 1)
        distance = np.hypot(y - cy, (x - cx) / squash) + 0.6 * _smooth_noise(rng, 2) - radius
        depth = np.clip(0.5 - distance / 2, 0, 1)
        lit = np.clip((y - cy + x - cx) / (1.4 * radius), 0, 1)
        rim = np.exp(-np.square((distance - 1) / 1.2)) * lit
        floor = 14 + 26 * lit * np.clip(1 + distance / radius, 0, 1)
        image = _blend(_blend(image, floor, depth), 235.0, 0.75 * rim)
    return image


def missing_piece(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An angular piece broken out: plain ground in it, a shadow on one side, light on the other."""
    y, x = _grid()
    cy, cx = rng.uniform(0.1, 0.9, size=2) * SIZE
    radius = rng.uniform(13, 24)
    distance = np.full(image.shape, -np.inf)
    normals = np.sort(rng.uniform(0, 2 * np.pi, size=rng.integers(5, 8)))
    # Half planes all around: without a large gap between two normals the piece is closed.
    normals = np.concatenate([normals, np.arange(3) * 2 * np.pi / 3 + rng.uniform(0, np.pi)])
    wobble = 0.8 * _smooth_noise(rng, 3)
    for normal in normals:
        reach = radius * rng.uniform(0.65, 1)
        plane = (y - cy) * np.sin(normal) + (x - cx) * np.cos(normal) - reach
        distance = np.maximum(distance, plane)
    distance = distance + wobble
    alpha = np.clip(0.5 - distance, 0, 1)
    light = rng.choice([0.45, 1.5])  # deep and dark, or bright and fresh
    ground = np.clip(light * image.mean(), 30, 225) + 6 * _smooth_noise(rng, 1.5)
    ground = ground + 5 * _smooth_noise(rng, 8)
    facing = ((y - cy) + (x - cx)) / (1.4 * radius)  # the light comes from the upper left
    wall = np.exp(-np.square((distance + 2) / 2))
    ground = ground - 60 * wall * np.clip(-facing, 0, 1) + 60 * wall * np.clip(facing, 0, 1)
    return _blend(image, ground, alpha)


KINDS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "scratch": scratch,
    "stain": stain,
    "hole": hole,
    "missing_piece": missing_piece,
}


def add_defect(
    image: np.ndarray, kind: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one defect, and its mask.

    Args:
      image: a normal image, uint8 `[h, w]`.
      kind: a key of `KINDS`.
      rng: what all of the defect's properties are drawn from.

    Returns:
      The defective image, uint8 `[h, w]`, and its mask, uint8 `[h, w]` in {0, 255}: the pixels that
      changed visibly, with the specks between them that by chance kept their grey. Outside of the
      mask nothing changed.
    """
    while True:
        changed = np.clip(np.rint(KINDS[kind](image.astype(float), rng)), 0, 255)
        visible = np.abs(changed - image) >= _VISIBLE
        padded = np.pad(ndimage.binary_opening(visible, np.ones((2, 2))), 3)
        closed = ndimage.binary_closing(padded, iterations=2)[3:-3, 3:-3]
        mask = ndimage.binary_fill_holes(closed)
        if mask.sum() >= _MIN_AREA and np.abs(changed - image)[mask].mean() >= _MIN_CHANGE:
            return np.where(mask, changed, image).astype(np.uint8), mask.astype(np.uint8) * 255


class Demo(base.AnomalyBuilder, skip_registration=True):
    """Crops of one photograph per category. Drawn anew from a fixed seed: no raw files."""

    name = "demo"
    title = "scikit-image's photographs"
    licence = "CC0"
    page = "https://scikit-image.org"
    counts = {
        category: (_NORMALS["train"], 0, _NORMALS["test"], _DEFECTIVE * len(KINDS))
        for category in ("gravel", "brick", "grass")
    }
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=c) for c in ("gravel", "brick", "grass")]

    @classmethod
    def _scan(cls, folder: pathlib.Path, stray: list[pathlib.Path]) -> list[base.Example]:
        raise AssertionError(f"the demo has no files to scan in {folder}")

    @classmethod
    def sources(cls, manual_dir: str | os.PathLike) -> dict[str, pathlib.Path]:
        """Returns the photographs' files, wherever scikit-image lies."""
        del manual_dir
        package = importlib.util.find_spec("skimage")
        if package is None:
            return {}
        folder = pathlib.Path(package.origin).parent / "data"
        return {name: path for name in cls.counts if (path := folder / f"{name}.png").is_file()}

    @classmethod
    def nothing_found(cls, manual_dir: str | os.PathLike) -> UserError:
        """Returns the error where scikit-image is not installed."""
        return cls._missing(manual_dir, "gravel")

    @classmethod
    def _missing(cls, manual_dir: str | os.PathLike, category: str) -> UserError:
        del manual_dir
        return UserError(
            f"demo/{category}: its photograph comes with scikit-image, which is not installed; "
            "in the source tree: pip install -e '.[demo]'"
        )

    @classmethod
    def scan(cls, category: str, manual_dir: str | os.PathLike) -> list[base.Example]:
        """Returns none: the demo has no files but photographs."""
        return []

    @classmethod
    def _source_fingerprint(cls, folder: pathlib.Path) -> str:
        # What is drawn follows from the photograph and this file.
        code = pathlib.Path(__file__).read_bytes()
        return hashlib.sha256(folder.read_bytes() + code).hexdigest()

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager
        source = self.sources("").get(self.builder_config.name)
        if source is None:
            raise self._missing("", self.builder_config.name)
        self.info.metadata["fingerprint"] = self._source_fingerprint(source)
        self._start_report([])
        return {split: self._draw(source, split) for split in _PARTS}

    def _draw(self, source: pathlib.Path, split: str) -> Iterator[tuple[str, dict]]:
        photograph = np.asarray(Image.open(source).convert("L"))
        first, last = _PARTS[split]
        kinds = {base.GOOD: _NORMALS[split]}
        if split == "test":
            kinds |= dict.fromkeys(KINDS, _DEFECTIVE)
        for kind, number in sorted(kinds.items()):
            for i in range(number):
                id_ = f"{split}/{kind}/{i:03d}"
                rng = np.random.default_rng(zlib.crc32(f"{source.stem}/{id_}".encode()))
                top = rng.integers(photograph.shape[0] - SIZE + 1)
                left = rng.integers(first, last - SIZE + 1)
                image = photograph[top : top + SIZE, left : left + SIZE]
                mask = np.zeros_like(image)
                if kind != base.GOOD:
                    image, mask = add_defect(image, kind, rng)
                yield id_, self._record(id_, split, kind, images.encode_png(image), mask)
