"""Evaluation: anomaly maps and scores of a test split, and what they are worth."""

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
from prn_jax.models.prn import PRN

Tree = Any


def image_score(maps: Float[Array, "b h w"], pixels: int) -> Float[Array, " b"]:
    """Mean of the highest pixels of each map.

    Args:
      maps: anomaly maps in [0, 1].
      pixels: how many at 256x256; in proportion to the area at other sizes, at least 1.
    """
    count = score_count(pixels, *maps.shape[1:])
    return jnp.mean(jax.lax.top_k(maps.reshape(maps.shape[0], -1), count)[0], axis=1)


def score_count(pixels: int, height: int, width: int) -> int:
    """Pixels that an image's score is the mean of, at a size other than 256x256."""
    area = height * width
    return min(area, max(1, round(pixels * area / 256**2)))


def make_eval_step(
    model: PRN, score_pixels: int, mesh: Mesh
) -> Callable[[Tree, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """The jitted step: `(variables, image) -> (maps, scores, distances)`, mapped over `data`."""

    def step(variables, image):
        logits, distances = model.apply(variables, image, method="inspect")
        maps = jax.nn.sigmoid(logits)
        return maps, image_score(maps, score_pixels), distances

    return jax.jit(_mapped(step, mesh))


def _mapped(step: Callable, mesh: Mesh) -> Callable:
    return jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))


@functools.cache  # A compiled step per network, however many a process holds.
def _cached_step(model: PRN, score_pixels: int, mesh: Mesh):
    return make_eval_step(model, score_pixels, mesh)


@functools.cache
def _descriptor_step(model: PRN, mesh: Mesh):
    def step(variables, image):
        return (model.apply(variables, image, method="descriptor"),)

    return jax.jit(_mapped(step, mesh))


def fixed_size(count: int, batch_size: int, mesh: Mesh) -> int:
    """Images that are computed at a time, of which there are few sizes: each compiles anew.

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
      batch_size: images at a time over all devices; rounded up to a multiple of their number.
      score_pixels: see `image_score`.
      progress: show a bar.
      fill: compute `batch_size` images at a time even where there are fewer, as one of many calls
        that are to compile once.

    Returns:
      Maps [n, h, w] and scores [n], float32 in [0, 1], and distances of the whole images from
      normal ones [n], float32: see `models.whole.WholeImage`.
    """
    step = _cached_step(model, score_pixels, mesh)
    size = fixed_size(batch_size if fill else len(images), batch_size, mesh)
    empty = np.empty(images.shape[:3], np.float32), *np.empty((2, len(images)), np.float32)
    return _run(step, variables, images, mesh, size, empty, progress)


def describe(
    model: PRN, variables: Tree, images: np.ndarray, mesh: Mesh, batch_size: int = 32
) -> np.ndarray:
    """What `models.whole.WholeImage` compares, in its unit, of images that every process holds.

    Args as of `predict`; returns float32 [n, d].
    """
    size = fixed_size(len(images), batch_size, mesh)
    spread = np.asarray(jax.device_get(variables["prototypes"]["whole"]["spread"]))
    empty = (np.empty((len(images), len(spread)), np.float32),)
    return _run(_descriptor_step(model, mesh), variables, images, mesh, size, empty)[0] / spread


def _run(step, variables, images, mesh, size, found, progress=False) -> tuple[np.ndarray, ...]:
    """Applies a step to `size` images at a time and writes its results into the arrays `found`.

    A batch that isn't full is filled up with blank images whose results are dropped: each image
    counts once, whatever the number of devices, and a few sizes (`fixed_size`) are compiled.
    """
    pending = []
    bar = tqdm(total=len(images), unit="image", disable=not progress, dynamic_ncols=True)
    with bar:
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            count = len(batch)
            if count < size:
                blank = np.zeros((size - count, *images.shape[1:]), images.dtype)
                batch = np.concatenate([batch, blank])
            # One batch is computed while the results of the one before it are fetched.
            pending.append((start, count, step(variables, meshes.shard_same(mesh, batch))))
            if len(pending) > 1 or start + size >= len(images):
                while pending:
                    first, number, results = pending.pop(0)
                    for array, result in zip(found, results, strict=True):
                        array[first : first + number] = meshes.gather(result)[:number]
                    bar.update(number)
                    if start + size < len(images):
                        break
    return found
