"""Images larger than the network's: cut into tiles that overlap, and their maps laid together.

One network looks at all tiles, each a sample by itself. Where two maps overlap, one fades into the
other linearly: what is constant stays so to the bit, and what is smooth stays smooth.
"""

import dataclasses
import functools
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

# Of NumPy or of JAX: slices are static, so that every export can have them.
Array = Any


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Where the tiles of an image lie; places are numbered row by row.

    Attributes:
      tile: (height, width) of one in pixels: what the network sees.
      grid: rows and columns of tiles.
      overlap: pixels that neighbours share; at most half of a side of a tile that has neighbours
        along it.
    """

    tile: tuple[int, int]
    grid: tuple[int, int] = (1, 1)
    overlap: int = 0

    @classmethod
    def of(cls, config: ConfigDict) -> "Tiling":
        """Of a configuration, see configs/default.py, of an earlier version's too."""
        tiles = tuple(config.get("tiles", (1, 1)))
        return cls(tuple(config.image_size), tiles, config.get("tile_overlap", 0))

    def __str__(self) -> str:
        """The size, and what it is made of, for people."""
        whole, tile, grid = ("{}x{}".format(*x) for x in (self.size, self.tile, self.grid))
        return tile if self.count == 1 else f"{whole} in {grid} tiles of {tile}"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the whole image in pixels."""
        return tuple(n * x - (n - 1) * self.overlap for n, x in zip(self.grid, self.tile))

    @property
    def count(self) -> int:
        """Places."""
        return self.grid[0] * self.grid[1]

    def bands(self, tiles: int) -> list[tuple[slice, "Tiling"]]:
        """Rows of tiles, as many together as have at most so many tiles, but at least one.

        Returns:
          The pixel rows of each band, and its own tiling.
        """
        (rows, columns), step = self.grid, self.tile[0] - self.overlap
        some = min(rows, max(1, tiles // columns))
        found = []
        for first in range(0, rows, some):
            band = dataclasses.replace(self, grid=(min(some, rows - first), columns))
            found.append((slice(first * step, first * step + band.size[0]), band))
        return found

    def cut(self, images: Array) -> Array:
        """Cuts images into tiles.

        Args:
          images: [n, height, width, ...], of `size`.

        Returns:
          [n * count, h, w, ...]: all places of the first image, then those of the second.
        """
        xp = images.__array_namespace__()
        tiles = [
            x for part in self._parts(images, 0) for x in self._parts(part, 1)
        ]  # fmt: skip
        return xp.reshape(xp.stack(tiles, axis=1), (-1, *self.tile, *images.shape[3:]))

    def counting(self, roi: np.ndarray | None) -> np.ndarray:
        """Which places have some of a region of interest, [height, width], bool [count]."""
        if roi is None:
            return np.ones(self.count, bool)
        return self.cut(roi[None]).any(axis=(1, 2))

    def at(self, images: Array, place: int) -> Array:
        """The tiles of one place, [n, h, w, ...], of images of `size`."""
        row, column = divmod(place, self.grid[1])
        return self._parts(self._parts(images, 0)[row], 1)[column]

    def blend(self, maps: Array) -> Array:
        """Lays what was made of tiles together.

        Args:
          maps: of tiles as `cut` gives them, float [n * count, h, w, ...].

        Returns:
          [n, height, width, ...].
        """
        xp = maps.__array_namespace__()
        rows, columns = self.grid
        maps = xp.reshape(maps, (-1, rows, columns, *maps.shape[1:]))
        strips = [self._join([maps[:, i, j] for j in range(columns)], 2) for i in range(rows)]
        return self._join(strips, 1)

    def lay(self, maps: np.ndarray, band: np.ndarray, rows: slice) -> None:
        """Does a part of `blend` in place, for maps too large to be held twice.

        Args:
          maps: [n, height, width], in which the bands before this one lie.
          band: blended by its own tiling, [n, h, width].
          rows: its pixel rows.
        """
        overlap = self.overlap if rows.start else 0
        here = maps[:, rows]
        seam = here[:, :overlap]
        seam += _ramp(np, overlap, maps.dtype)[:, None] * (band[:, :overlap] - seam)
        here[:, overlap:] = band[:, overlap:]

    def _parts(self, images: Array, side: int) -> list[Array]:
        """What each row (side 0) or column (side 1) of tiles covers."""
        size = self.tile[side]
        starts = (i * (size - self.overlap) for i in range(self.grid[side]))
        return [_take(images, start, start + size, side + 1) for start in starts]

    def _join(self, parts: list[Array], axis: int) -> Array:
        """Lays parts together along an axis, the end of each over the beginning of the next."""
        if len(parts) == 1 or not self.overlap:
            return parts[0].__array_namespace__().concatenate(parts, axis=axis)
        xp, overlap = parts[0].__array_namespace__(), self.overlap
        take = functools.partial(_take, axis=axis)
        ramp = _ramp(xp, overlap, parts[0].dtype)
        ramp = xp.reshape(ramp, (-1, *[1] * (parts[0].ndim - axis - 1)))
        inner = self.tile[axis - 1] - overlap
        laid = [take(parts[0], 0, inner)]
        for before, after in zip(parts, parts[1:]):
            end, beginning = take(before, inner, None), take(after, 0, overlap)
            # Not two products: of equal values nothing but themselves comes out.
            laid += [end + ramp * (beginning - end), take(after, overlap, inner)]
        laid.append(take(parts[-1], inner, None))
        return xp.concatenate(laid, axis=axis)


def _ramp(xp: ModuleType, overlap: int, dtype: Any) -> Array:
    return (xp.arange(overlap, dtype=dtype) + 0.5) / overlap


def _take(array: Array, start: int, stop: int | None, axis: int) -> Array:
    return array[(*[slice(None)] * axis, slice(start, stop))]
