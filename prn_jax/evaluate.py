"""Evaluation: anomaly maps and scores of images, and what they are worth."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from tqdm import tqdm

from prn_jax import mesh as meshes
from prn_jax.metrics import evaluate_rankings, rank_images, rank_pixels
from prn_jax.models.prn import PRN
from prn_jax.models.whole import raised
from prn_jax.splits import Images

Tree = Any


def metrics_of(
    images: Images, maps: np.ndarray, scores: np.ndarray, roi: np.ndarray | None = None
) -> dict[str, float | None]:
    """All figures of what was predicted, see `metrics.evaluate_rankings`.

    Args:
      images: [n]; an anomalous one without a mask counts for the image-level figures alone.
      maps: [n, h, w].
      scores: [n].
      roi: where pixels count, [h, w]; None: everywhere.
    """
    pixels = rank_pixels(maps, images.mask, roi, images.has_mask)
    return evaluate_rankings(rank_images(scores, images.label), pixels)


def image_score(maps: Float[Array, "b h w"], pixels: int) -> Float[Array, " b"]:
    """Mean of the highest pixels of each map.

    Args:
      maps: anomaly maps in [0, 1].
      pixels: how many at 256x256; in proportion to the area at other sizes, at least 1.
    """
    count = score_count(pixels, *maps.shape[1:])
    return jnp.mean(jax.lax.top_k(maps.reshape(maps.shape[0], -1), count)[0], axis=1)


def exponent_of(model: PRN, variables: Tree) -> jax.Array | None:
    """By which distances have a part in scores: see `models.whole.raised`."""
    return variables["prototypes"]["whole"]["exponent"] if model.score_distance else None


def score_count(pixels: int, height: int, width: int) -> int:
    """Pixels that an image's score is the mean of, at a size other than 256x256."""
    area = height * width
    return min(area, max(1, round(pixels * area / 256**2)))


@functools.cache  # A compiled step per network, however many a process holds.
def make_eval_step(
    model: PRN, score_pixels: int, mesh: Mesh
) -> Callable[[Tree, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """The jitted step: `(variables, image) -> (maps, scores, distances)`, mapped over `data`."""

    def step(variables, image):
        logits, distances = model.apply(variables, image, method="inspect")
        maps = jax.nn.sigmoid(logits)
        scores = image_score(maps, score_pixels)
        return maps, raised(scores, distances, exponent_of(model, variables)), distances

    return jax.jit(mapped(step, mesh))


def mapped(step: Callable, mesh: Mesh, inputs: int = 1) -> Callable:
    """A step `(variables, *inputs) -> results` as a program per device, mapped over `data`."""
    specs = P(), *[P("data")] * inputs
    return jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P("data"))


@functools.cache
def _descriptor_step(model: PRN, mesh: Mesh):
    def step(variables, image):
        return (model.apply(variables, image, method="descriptor"),)

    return jax.jit(mapped(step, mesh))


@functools.cache
def _tile_step(model: PRN, mesh: Mesh, with_maps: bool):
    def step(variables, tiles, mask):
        if not with_maps:
            return (model.apply(variables, tiles, mask, method="descriptor"),)
        logits, descriptors = model.apply(variables, tiles, mask, method="look")
        return jax.nn.sigmoid(logits), descriptors

    return jax.jit(mapped(step, mesh, 2))


@functools.cache
def _distance_step(model: PRN, mesh: Mesh):
    def step(variables, descriptor):
        return (model.apply(variables, descriptor, method="distance"),)

    return jax.jit(mapped(step, mesh))


def fixed_size(count: int, batch_size: int, mesh: Mesh) -> int:
    """The batch size to compute with: one of a few, because each is compiled.

    Args:
      count: images there are.
      batch_size: at most so many.
      mesh: devices, among which they are divided.

    Returns:
      The least of 1, 4, 16, ... and `batch_size`, each rounded up to a multiple of the devices,
      that holds all images; without one, the largest.
    """
    size = 1
    while size < min(count, batch_size):
        size *= 4
    return -(-max(1, min(size, batch_size)) // mesh.size) * mesh.size


def predict(
    model: PRN,
    variables: Tree,
    images: np.ndarray,
    mesh: Mesh,
    *,
    batch_size: int = 32,
    score_pixels: int = 100,
    progress: bool = False,
    fill: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Anomaly maps, scores and distances of images that every process holds.

    Args:
      model: the network.
      variables: its collections, on the devices.
      images: uint8 [n, h, w, 3].
      mesh: devices.
      batch_size: images, or tiles, at a time over all devices; rounded up to a multiple of their
        number.
      score_pixels: see `image_score`.
      progress: show a bar.
      fill: compute `batch_size` images at a time even where there are fewer, as one of many calls
        that are to compile once.

    Returns:
      Maps [n, h, w] and scores [n], float32 in [0, 1], and distances of the whole images from
      normal ones [n], float32: see `models.whole.WholeImage`.
    """
    batch_size = max(1, batch_size // len(model.turns))  # each turn is an image more
    if model.tiling:
        maps, descriptors = _stitch(
            model, variables, images, mesh, batch_size, fill=fill, progress=progress
        )
        size = fixed_size(len(images), batch_size, mesh)
        distances = np.empty(len(images), np.float32)
        run_batches(
            _distance_step(model, mesh), variables, (descriptors,), mesh, size, (distances,)
        )
        scores = np.array([_score(x, score_pixels) for x in maps], np.float32)
        exponent = jax.device_get(exponent_of(model, variables))
        return maps, raised(scores, distances, exponent), distances
    step = make_eval_step(model, score_pixels, mesh)
    size = fixed_size(batch_size if fill else len(images), batch_size, mesh)
    empty = np.empty(images.shape[:3], np.float32), *np.empty((2, len(images)), np.float32)
    return run_batches(step, variables, (images,), mesh, size, empty, progress)


def describe(
    model: PRN, variables: Tree, images: np.ndarray, mesh: Mesh, batch_size: int = 32
) -> np.ndarray:
    """What `models.whole.WholeImage` compares, in its unit, of images that every process holds.

    Args as of `predict`; returns float32 [n, d].
    """
    spread = np.asarray(jax.device_get(variables["prototypes"]["whole"]["spread"]))
    return descriptors(model, variables, images, mesh, batch_size) / spread


def descriptors(
    model: PRN, variables: Tree, images: np.ndarray, mesh: Mesh, batch_size: int = 32
) -> np.ndarray:
    """Means over the images of colours and features: see `models.whole.describe`.

    Args as of `predict`; returns float32 [n, d].
    """
    if model.tiling:
        return _stitch(model, variables, images, mesh, batch_size, with_maps=False)[0]
    size = fixed_size(len(images), batch_size, mesh)
    empty = (np.empty((len(images), sum(model.kinds)), np.float32),)
    return run_batches(_descriptor_step(model, mesh), variables, (images,), mesh, size, empty)[0]


def stitched(model: PRN, variables: Tree, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps and distances of whole images, uint8 [b, h, w, 3], of any b, as one graph."""
    tiling = model.tiling
    if not tiling:
        logits, distances = model.apply(variables, image, method="inspect")
        return jax.nn.sigmoid(logits), distances
    interest = jnp.asarray(_interest(model, variables))
    masks = tiling.cut(interest[None])
    # ONNX has no mean of uint8.
    weights = jnp.mean(masks.astype(jnp.float32), axis=(1, 2))
    # Not by `broadcast_to`: some exports know no shape that holds a batch of any size.
    ones = image[:, :1, :1, 0] * 0 + 1
    counts = (masks[None] * ones[:, None]).reshape(-1, *tiling.tile)
    logits, found = model.apply(variables, tiling.cut(image), counts, method="look")
    found = found.reshape(-1, tiling.count, found.shape[-1])
    descriptor = jnp.sum(found * weights[:, None], axis=1) / jnp.maximum(jnp.sum(weights), 1e-6)
    maps = tiling.blend(jax.nn.sigmoid(logits)) * interest.astype(jnp.float32)
    return maps, model.apply(variables, descriptor, method="distance")


def _interest(model: PRN, variables: Tree) -> np.ndarray:
    """Where a stitched image counts, uint8 [h, w] in {0, 1}."""
    stored = variables.get("prototypes", {}).get("interest")
    if stored is None:
        return np.ones(model.tiling.size, np.uint8)
    return np.asarray(jax.device_get(stored["mask"]))


def _stitch(
    model: PRN,
    variables: Tree,
    images: np.ndarray,
    mesh: Mesh,
    batch_size: int,
    *,
    with_maps: bool = True,
    fill: bool = False,
    progress: bool = False,
) -> tuple[np.ndarray, ...]:
    """Maps [n, h, w], if they are asked for, and descriptors [n, d] of images larger than a tile.

    `batch_size` tiles are computed at a time, however many an image has. A descriptor is the mean
    of its tiles', each in proportion to what counts of it.
    """
    tiling, interest = model.tiling, _interest(model, variables)
    size = fixed_size(batch_size if fill else len(images) * tiling.count, batch_size, mesh)
    step, dimensions = _tile_step(model, mesh, with_maps), sum(model.kinds)
    maps = np.empty((len(images) if with_maps else 0, *tiling.size), np.float32)
    found = np.empty((len(images), dimensions), np.float32)
    together = max(1, size // tiling.count)
    bar = tqdm(total=len(images), unit="image", disable=not progress, dynamic_ncols=True)
    with bar:
        for start in range(0, len(images), together):
            some = images[start : start + together]
            means, weights = [], []
            for rows, band in tiling.bands(size):
                tiles = band.cut(some[:, rows])
                masks = np.tile(band.cut(interest[None, rows]), (len(some), 1, 1))
                empty = (np.empty((len(tiles), dimensions), np.float32),)
                if with_maps:
                    empty = (np.empty(tiles.shape[:3], np.float32), *empty)
                *values, mean = run_batches(step, variables, (tiles, masks), mesh, size, empty)
                for part in map(band.blend, values):
                    tiling.lay(maps[start : start + len(some)], part, rows)
                means.append(mean.reshape(len(some), band.count, dimensions))
                weights.append(masks.mean(axis=(1, 2)).reshape(len(some), band.count, 1))
            means, weights = np.concatenate(means, axis=1), np.concatenate(weights, axis=1)
            amount = np.maximum(weights.sum(axis=1), 1e-6)
            found[start : start + len(some)] = (means * weights).sum(axis=1) / amount
            bar.update(len(some))
    return (maps, found) if with_maps else (found,)


def _score(values: np.ndarray, pixels: int) -> np.float32:
    """`image_score` of one map, which may be too large to be sorted on a device."""
    count = score_count(pixels, *values.shape)
    return np.partition(values, values.size - count, axis=None)[-count:].mean()


def run_batches(
    step, variables, inputs, mesh, size, found, progress=False
) -> tuple[np.ndarray, ...]:
    """Applies a step to `size` of each of its inputs at a time; writes its results into `found`.

    A batch that isn't full is filled up with blank images whose results are dropped: each image
    counts once, whatever the number of devices, and a few sizes (`fixed_size`) are compiled.
    """
    pending, total = [], len(inputs[0])
    bar = tqdm(total=total, unit="image", disable=not progress, dynamic_ncols=True)
    with bar:
        for start in range(0, total, size):
            count = min(size, total - start)
            batch = [x[start : start + count] for x in inputs]
            if count < size:
                batch = [np.concatenate([x, np.zeros_like(x[:1]).repeat(size - count, 0)])
                         for x in batch]  # fmt: skip
            # One batch is computed while the results of the one before it are fetched.
            batch = [meshes.shard_same(mesh, x) for x in batch]
            pending.append((start, count, step(variables, *batch)))
            last = start + size >= total
            while len(pending) > (0 if last else 1):
                first, number, results = pending.pop(0)
                for array, result in zip(found, results, strict=True):
                    array[first : first + number] = meshes.gather(result)[:number]
                bar.update(number)
    return found
