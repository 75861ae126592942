"""What is fitted to the normal images before training: prototypes, memory, whole-image centres."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prn_jax import mesh as meshes
from prn_jax.evaluate import descriptors, mapped, predict, run_batches
from prn_jax.models.memory import choose_patches
from prn_jax.models.prn import PRN, SCALES, untrained_beside
from prn_jax.models.prototypes import k_means
from prn_jax.models.whole import WholeImage, exponent, fit_whole
from prn_jax.tiles import Tiling

Tree = Any


def fit_prototypes(
    config: ConfigDict,
    model: PRN,
    variables: Tree,
    images: np.ndarray,
    mesh: Mesh,
    seen: np.ndarray | None = None,
) -> dict[str, jax.Array]:
    """Clusters the frozen feature maps of the normal images, each scale by itself.

    Of images that are looked at in tiles, each place is clustered by itself too: a whole map is
    tied to its place. The memory of patches is chosen from the tiles of all places.

    Args:
      config: see configs/default.py.
      model: the network.
      variables: the collections `backbone` and, for stage 4, `params`, on every device; of
        `prototypes` the region of interest.
      images: normal training images, uint8 [n, h, w, 3], not cut into tiles, the same on every
        process.
      mesh: devices.
      seen: seen anomalies, uint8 [m, h, w, 3], from which `score_distance` is told; default: none.

    Returns:
      The `prototypes` collection, see `PRN`, without `interest`; on every device.
    """
    count = min(len(images), config.prototypes.max_images)
    some = images[np.linspace(0, len(images) - 1, count).round().astype(int)]
    if len(some) < len(images):
        logging.info(
            "prototypes are made of %d of the %d normal images, evenly spread "
            "(prototypes.max_images)",
            len(some), len(images),
        )  # fmt: skip
    result = _fit_network(config, model, variables, images, some, mesh, seen)
    if model.beside_name:
        known = {"backbone": variables["backbone"]["beside"]}
        known["prototypes"] = variables.get("prototypes", {})
        beside = untrained_beside(model)
        found = _fit_network(config, beside, known, images, some, mesh)
        result["beside"] = {name: x for name, x in found.items() if name != "whole"}
    return result


def _fit_network(
    config: ConfigDict,
    model: PRN,
    variables: Tree,
    images: np.ndarray,
    some: np.ndarray,
    mesh: Mesh,
    seen: np.ndarray | None = None,
) -> dict[str, Any]:
    """What one network compares with; its prototypes are of `some` of the images."""
    looks = [
        _fit_look(config, model, variables, images, some, mesh, look)
        for look in range(len(model.doublings))
    ]
    means = descriptors(model, variables, some, mesh, config.eval_batch_size)
    key = jax.random.fold_in(jax.random.key(config.seed), SCALES)
    whole = fit_whole(means, model.kinds, model.num_centres, key, mesh)
    result = looks[0] | {f"closer_{i}": x for i, x in enumerate(looks[1:])}
    if model.score_distance:
        strange = images[:0] if seen is None else seen
        strange = descriptors(model, variables, strange, mesh, config.eval_batch_size)
        distance = functools.partial(WholeImage(model.num_centres).apply, {"prototypes": whole})
        normal, strange = (np.asarray(distance(jnp.asarray(x))) for x in (means, strange))
        whole["exponent"] = exponent(normal, strange, model.score_distance)
        logging.info(
            "score_distance: the odds of a score are multiplied by the distance to the power of "
            "%.2f, as %d seen anomalies tell", whole["exponent"], len(strange),
        )  # fmt: skip
    result["whole"] = meshes.replicate(mesh, whole)
    if not model.trained:
        stored = {"prototypes": variables.get("prototypes", {}) | result}
        maps, *_ = predict(model, variables | stored, some, mesh, batch_size=config.eval_batch_size)
        # With 1 for the reference the map is d / (d + 1).
        highest = np.max(maps, axis=(1, 2)).astype(np.float64)
        reference = np.mean(highest / (1.0 - highest))
        for look in looks:
            look["patch_map"]["reference"] = meshes.replicate(mesh, np.float32(reference))
    return result


def _fit_look(
    config: ConfigDict,
    model: PRN,
    variables: Tree,
    images: np.ndarray,
    some: np.ndarray,
    mesh: Mesh,
    look: int,
) -> dict[str, Any]:
    """What one look at the images compares with; its prototypes are of `some` of them."""
    key = jax.random.key(config.seed)
    tiling = Tiling.of(config)
    places = tiling.count if model.trained else 1  # without training no whole map is compared with
    result = {}
    for scale in range(SCALES):

        def features(*x, scale=scale):
            return (model.apply(*x, look, method="features")[scale],)

        step = jax.jit(mapped(features, mesh))
        over_images = functools.partial(_over_images, config, variables, mesh, step)
        centres = []
        for place in range(places):
            # One scale and place at a time: all maps of the images are larger than the images.
            maps = over_images(tiling.at(some, place))
            found = k_means(
                maps.reshape(len(maps), -1),
                model.num_prototypes // places,
                jax.random.fold_in(key, scale + (SCALES + 1) * (place + places * look)),
                mesh,
                config.prototypes.iterations,
            )
            centres.append(np.asarray(jax.device_get(found)).reshape(-1, *maps.shape[1:]))
        result[f"scale_{scale}"] = {"maps": meshes.replicate(mesh, np.concatenate(centres))}
        if model.num_patches and scale + 1 in model.memory_scales:
            if model.tiling:
                maps = over_images(_some_tiles(config, images))
            patches = choose_patches(maps, model.num_patches, config.seed)
            result[f"memory_{scale}"] = {"patches": meshes.replicate(mesh, patches)}
    if not model.trained:
        result["patch_map"] = {"reference": meshes.replicate(mesh, np.float32(1.0))}
    return result


def _some_tiles(config: ConfigDict, images: np.ndarray) -> np.ndarray:
    """As many tiles as `prototypes.max_images` says, at most, drawn from all places and images."""
    tiling = Tiling.of(config)
    count = len(images) * tiling.count
    chosen = np.random.default_rng(config.seed).permutation(count)[: config.prototypes.max_images]
    pairs = (divmod(int(number), tiling.count) for number in np.sort(chosen))
    return np.concatenate([tiling.at(images[i : i + 1], place) for i, place in pairs])


def _over_images(
    config: ConfigDict,
    variables: Tree,
    mesh: Mesh,
    step: Callable[[Tree, jax.Array], tuple[jax.Array]],
    images: np.ndarray,
) -> np.ndarray:
    """What a mapped function of the variables and some images gives for all of them, [n, ...]."""
    size = -(-min(config.eval_batch_size, len(images)) // mesh.size) * mesh.size
    batch = jax.ShapeDtypeStruct((size, *images.shape[1:]), images.dtype)
    (one,) = jax.eval_shape(step, variables, batch)
    found = (np.empty((len(images), *one.shape[1:]), one.dtype),)
    return run_batches(step, variables, (images,), mesh, size, found)[0]
