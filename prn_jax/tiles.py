"""Images larger than the network's: cut into tiles that overlap, and their maps laid together.

One network looks at all tiles, each a sample by itself. Where two maps overlap, one fades into the
other linearly: what is constant stays so to the bit, and what is smooth stays smooth.
"""

import dataclasses
import functools
from typing import Any

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

    @property
    def row(self) -> "Tiling":
        """The tiling of one row of tiles."""
        return dataclasses.replace(self, grid=(1, self.grid[1]))

    def rows(self, images: Array) -> list[Array]:
        """The part of images, [n, height, width, ...], that each row of tiles covers."""
        return _parts(images, 1, self.grid[0], self.tile[0], self.overlap)

    def cut(self, images: Array) -> Array:
        """Cuts images into tiles.

        Args:
          images: [n, height, width, ...], of `size`.

        Returns:
          [n * count, h, w, ...]: all places of the first image, then those of the second.
        """
        xp = images.__array_namespace__()
        tiles = [
            x for part in self.rows(images)
            for x in _parts(part, 2, self.grid[1], self.tile[1], self.overlap)
        ]  # fmt: skip
        return xp.reshape(xp.stack(tiles, axis=1), (-1, *self.tile, *images.shape[3:]))

    def at(self, images: Array, place: int) -> Array:
        """The tiles of one place, [n, h, w, ...], of images of `size`."""
        row, column = divmod(place, self.grid[1])
        parts = _parts(self.rows(images)[row], 2, self.grid[1], self.tile[1], self.overlap)
        return parts[column]

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
        return self.stack(strips)

    def stack(self, strips: list[Array]) -> Array:
        """Lays blended rows, each [n, h, width, ...], together: [n, height, width, ...]."""
        return self._join(strips, 1)

    def _join(self, parts: list[Array], axis: int) -> Array:
        """Lays parts together along an axis, the end of each over the beginning of the next."""
        if len(parts) == 1 or not self.overlap:
            return parts[0].__array_namespace__().concatenate(parts, axis=axis)
        xp, overlap = parts[0].__array_namespace__(), self.overlap
        take = functools.partial(_take, axis=axis)
        ramp = (xp.arange(overlap, dtype=parts[0].dtype) + 0.5) / overlap
        ramp = xp.reshape(ramp, (-1, *[1] * (parts[0].ndim - axis - 1)))
        inner = self.tile[axis - 1] - overlap
        laid = [take(parts[0], 0, inner)]
        for before, after in zip(parts, parts[1:]):
            end, beginning = take(before, inner, None), take(after, 0, overlap)
            # Not two products: of equal values nothing but themselves comes out.
            laid += [end + ramp * (beginning - end), take(after, overlap, inner)]
        laid.append(take(parts[-1], inner, None))
        return xp.concatenate(laid, axis=axis)


def _parts(images: Array, axis: int, count: int, size: int, overlap: int) -> list[Array]:
    starts = (i * (size - overlap) for i in range(count))
    return [_take(images, start, start + size, axis) for start in starts]


def _take(array: Array, start: int, stop: int | None, axis: int) -> Array:
    return array[(*[slice(None)] * axis, slice(start, stop))]
