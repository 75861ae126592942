"""What is made of the normal images before training: prototypes, a memory, a scale of residuals."""

from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from prn_jax import mesh as meshes
from prn_jax.evaluate import predict
from prn_jax.models.memory import choose_patches
from prn_jax.models.prn import PRN, SCALES
from prn_jax.models.prototypes import k_means

Tree = Any


def fit_prototypes(
    config: ConfigDict, model: PRN, variables: Tree, images: np.ndarray, mesh: Mesh
) -> dict[str, jax.Array]:
    """Clusters the frozen feature maps of the normal images, each scale by itself.

    Args:
      config: see configs/default.py.
      model: the network.
      variables: the collections `backbone` and, for stage 4, `params`, on every device.
      images: normal training images, uint8 [n, h, w, 3], the same on every process.
      mesh: devices.

    Returns:
      The `prototypes` collection, see `PRN`, on every device.
    """
    count = min(len(images), config.prototypes.max_images)
    some = images[np.linspace(0, len(images) - 1, count).round().astype(int)]
    if len(some) < len(images):
        logging.info(
            "prototypes are made of %d of the %d normal images, evenly spread "
            "(prototypes.max_images)",
            len(some), len(images),
        )  # fmt: skip
    key = jax.random.key(config.seed)
    result = {}
    for scale in range(SCALES):
        # One scale at a time: all maps of the images are larger than the images.
        maps = _over_images(config, model, variables, some, mesh, "features", scale)
        centres = k_means(
            maps.reshape(len(maps), -1),
            model.num_prototypes,
            jax.random.fold_in(key, scale),
            mesh,
            config.prototypes.iterations,
        )
        result[f"scale_{scale}"] = {"maps": centres.reshape(-1, *maps.shape[1:])}
        if model.num_patches and scale + 1 in model.memory_scales:
            patches = choose_patches(maps, model.num_patches, config.seed)
            result[f"memory_{scale}"] = {"patches": meshes.replicate(mesh, patches)}
    for scale in range(SCALES if model.use_relative else 0):
        stored = variables | {"prototypes": result}
        means = _over_images(config, model, stored, some, mesh, "mean_residuals", scale)
        for number, mean in enumerate(means):
            mean = meshes.replicate(mesh, mean.mean(0, np.float64).astype(np.float32))
            result[f"relative_{scale}_{number}"] = {"mean": mean}
    if not model.trained:
        result["patch_map"] = {"reference": meshes.replicate(mesh, np.float32(1.0))}
        maps, _ = predict(model, variables | {"prototypes": result}, images, mesh)
        # With 1 for the reference the map is d / (d + 1).
        highest = np.max(maps, axis=(1, 2)).astype(np.float64)
        reference = np.mean(highest / (1.0 - highest))
        result["patch_map"]["reference"] = meshes.replicate(mesh, np.float32(reference))
    return result


def _over_images(config, model, variables, images, mesh, method: str, scale: int) -> Tree:
    """What a method of the network gives for all images at one scale: NumPy arrays [n, ...]."""
    function = jax.jit(
        jax.shard_map(
            lambda variables, image: model.apply(variables, image, method=method)[scale],
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P("data"),
        )
    )
    count = len(images)
    size = -(-min(config.eval_batch_size, count) // mesh.size) * mesh.size
    whole = None
    for start in range(0, count, size):
        batch = images[start : start + size]
        padded = np.concatenate([batch, np.zeros_like(images[:1]).repeat(size - len(batch), 0)])
        found = function(variables, meshes.shard_same(mesh, padded))
        if whole is None:
            whole = jax.tree.map(lambda x: np.empty((count, *x.shape[1:]), x.dtype), found)
        for array, part in zip(jax.tree.leaves(whole), jax.tree.leaves(found)):
            array[start : start + size] = meshes.gather(part)[: len(batch)]
    return whole
