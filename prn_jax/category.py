"""One category of a run: load its images, train, evaluate, write the results."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import logging
from clu.parameter_overview import count_parameters
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prn_jax import evaluate, explain, pictures, results, thresholds, trained_on
from prn_jax import mesh as meshes
from prn_jax import train as training
from prn_jax.checkpoints import Checkpoints, digest
from prn_jax.identity import Identity, as_dict
from prn_jax.models.prn import compute_dtype
from prn_jax.synthesis import textures
from prn_jax.tiles import Tiling

if TYPE_CHECKING:
    from prn_jax.input_pipeline import CategoryData


def train_and_evaluate(
    config: ConfigDict, folder: epath.Path, mesh: Mesh, allow_config_change: bool
) -> dict[str, float | None]:
    """Trains and evaluates `config.category`; writes its results.

    Args:
      config: as `fields.checked` returns it, with the name of the category.
      folder: the category's, held by this run.
      mesh: devices.
      allow_config_change: see `experiment.train_and_evaluate`.

    Returns:
      The metrics.

    Raises:
      UserError: see `experiment.train_and_evaluate`.
    """
    began = time.monotonic()
    data = _load(config)
    load_seconds = time.monotonic() - began
    trained = _train(config, folder, data, mesh, allow_config_change)
    began = time.monotonic()
    found = _evaluate(config, trained, data, mesh)
    timing = trained.timing | {
        "load_seconds": load_seconds,
        "evaluate_seconds": time.monotonic() - began,
    }
    if meshes.is_main():
        _write(config, folder, data, trained, found, timing)
    meshes.barrier(f"{config.category} is evaluated")
    return found.metrics


def _load(config: ConfigDict) -> "CategoryData":
    """The category's images, the same on every process."""
    # TensorFlow is needed from here on: it reads the images.
    from prn_jax import input_pipeline

    data = meshes.first_on_main(
        f"loading {config.category}", lambda: input_pipeline.load_category(config, config.category)
    )
    parts = [data.train.id, data.seen.id, data.held.id, data.test.id]
    meshes.require_same(
        f"images of {config.category} (data.manual_dir, data.data_dir)",
        [data.fingerprint, data.white_level, *parts],
    )
    logging.info(
        "%s: %d normal and %d seen anomalous images to train, %d normal ones held out, %d to test "
        "(%d of them anomalous)",
        config.category,
        len(data.train.id),
        len(data.seen.id),
        len(data.held.id),
        len(data.test.id),
        int(np.sum(data.test.label)),
    )
    return data


def _train(
    config: ConfigDict, folder: epath.Path, data: "CategoryData", mesh: Mesh, allow: bool
) -> training.Trained:
    from prn_jax import board, input_pipeline

    def make_batches(start: int, steps: int) -> Iterable[dict[str, np.ndarray]]:
        return input_pipeline.train_batches(
            config,
            data,
            total_steps=steps,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluate_during(step, model, variables):
        maps, scores, _ = _predict(config, model, variables, data.test, mesh)
        metrics = evaluate.metrics_of(data.test, maps, scores, data.roi)
        board.write_test(writer, step, data.test, maps, metrics)
        logging.info("step %d: %s", step, _one_line(metrics))

    tiles = int(Tiling.of(config).counting(data.roi).sum())
    identity = Identity(
        config.data.name,
        config.category,
        data.fingerprint,
        tuple(data.seen.id),
        training.total_steps(config, len(data.train) * tiles),
        data.white_level,
        as_dict(config),
        held=tuple(data.held.id),
        textures=textures.fingerprint(config),
        dtype=np.dtype(compute_dtype(config)).name,
        turns=input_pipeline.turns(config, data),
    )
    meshes.barrier("the textures are looked at")
    meshes.require_same(
        "textures and types (synthesis.textures, scikit-image, dtype)",
        [identity.textures, identity.dtype],
    )

    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    writer = board.create_writer(folder)
    try:
        board.write_config(writer, config)
        identity = training.resumable(checkpoints, identity, allow)
        resumed = checkpoints.latest_step() is not None

        def record():
            parts = data.train, data.seen, data.test, data.held
            trained_on.remember(checkpoints.folder, *parts, resumed)
            (folder / "results.json").unlink(missing_ok=True)  # it is of what was before

        return training.train(
            config,
            data.train.image,
            make_batches,
            checkpoints,
            mesh,
            identity,
            write_scalars=writer.write_scalars,
            describe=functools.partial(board.write_parameters, writer),
            actions=board.profile(config, folder, identity.steps),
            evaluate=evaluate_during,
            roi=data.roi,
            seen_images=data.seen.image,
            begun=lambda: meshes.from_main("the record of what is trained on", record),
        )
    finally:
        checkpoints.close()
        writer.close()


@dataclasses.dataclass(frozen=True)
class _Evaluated:
    """What a trained network gives.

    Attributes:
      maps: of the test images, float32 [n, h, w].
      scores: of the test images, [n].
      distances: of the test images, [n].
      metrics: see `evaluate.metrics_of`.
      held_scores: of the normal images held out, [m].
      held_distances: of the normal images held out, [m].
      thresholds: see `thresholds.choose`.
      rates: see `thresholds.at_rates`.
      normals: to explain with.
      nearest: numbers of those of them that the test images are most like, [n].
    """

    maps: np.ndarray
    scores: np.ndarray
    distances: np.ndarray
    metrics: dict[str, float | None]
    held_scores: np.ndarray
    held_distances: np.ndarray
    thresholds: dict[str, Any]
    rates: list[dict[str, Any]]
    normals: explain.Normals
    nearest: np.ndarray


def _evaluate(
    config: ConfigDict, trained: training.Trained, data: "CategoryData", mesh: Mesh
) -> _Evaluated:
    """The same on every process."""
    network = config, trained.model, trained.variables
    maps, scores, distances = _predict(*network, data.test, mesh)
    held_maps, held_scores, held_distances = _predict(*network, data.held, mesh)
    inside = slice(None) if data.roi is None else data.roi > 0
    some = data.train.pick(explain.kept(len(data.train)))
    # Before the thresholds, whose pixels are sorted by each host in its own time.
    descriptions = [_described(*network, x, mesh) for x in (some, data.test)]
    normals = explain.Normals.of(some.id, some.image, descriptions[0])

    def trained_ones():
        maps, scores, _ = _predict(*network, some, mesh)
        return maps[:, inside], scores

    chosen = thresholds.choose(
        scores,
        data.test.label,
        maps[:, inside],
        data.test.mask[:, inside],
        trained_on=trained_ones,
        held=(held_maps[:, inside], held_scores),
        distances=(distances, held_distances),
    )
    rates = config.thresholds.false_alarms
    return _Evaluated(
        maps,
        scores,
        distances,
        evaluate.metrics_of(data.test, maps, scores, data.roi),
        held_scores,
        held_distances,
        chosen,
        thresholds.at_rates(chosen, rates, scores, data.test.label),
        normals,
        normals.nearest(descriptions[1]),
    )


def _write(
    config: ConfigDict,
    folder: epath.Path,
    data: "CategoryData",
    trained: training.Trained,
    found: _Evaluated,
    timing: dict[str, Any],
) -> None:
    """Writes the results and what decides in prediction; `results.json` last."""
    from prn_jax import board

    chosen, steps = found.thresholds, trained.identity.steps
    table = _table(data.test, found.scores, found.distances)
    run = {
        "category": config.category,
        "dataset": config.data.name,
        "metrics": found.metrics,
        "thresholds": {x: chosen[x] for x in ("image", "pixel", "distance", "basis")}
        | {"rates": found.rates},
        "steps": steps,
        "split": {
            "seed": config.split_seed,
            "seen": list(data.seen.id),
            "held": list(data.held.id),
        },
        "test": [
            row | {"nearest": found.normals.id[number]}
            for row, number in zip(table, found.nearest, strict=True)
        ],
        "held": _table(data.held, found.held_scores, found.held_distances),
        "config": as_dict(config),
        "identity": trained.identity.as_json(),
        "seed": config.seed,
        "provenance": results.provenance(),
        "timing": timing,
        "parameters": int(count_parameters(trained.variables["params"])),
    }
    if len(data.test):
        sheet = pictures.results_sheet(data.test, found.maps, found.scores)
        pictures.save_png(folder / "results.png", sheet)
        with contextlib.closing(board.create_writer(folder)) as writer:
            board.write_test(writer, steps, data.test, found.maps, found.metrics)
    # What decides lies beside what computes: a copy of the checkpoints is enough to predict.
    checkpoints = folder / "checkpoints"
    made_for = {
        "score_pixels": config.score_pixels,
        "network": digest(trained.variables),
        "dtype": np.dtype(trained.model.dtype).name,
    }
    results.write_thresholds(checkpoints, steps, chosen | made_for)
    found.normals.write(checkpoints)
    results.write_predictions(folder, data.test, found.maps, data.roi)
    results.write_run(folder, run)
    logging.info("%s: %s", config.category, _one_line(found.metrics))
    thresholds.log_rates(found.rates)


def _predict(config, model, variables, images, mesh):
    """Maps, scores and distances of a split, the same on every process."""
    return evaluate.predict(
        model,
        variables,
        images.image,
        mesh,
        batch_size=config.eval_batch_size,
        score_pixels=config.score_pixels,
    )


def _described(config, model, variables, images, mesh):
    """Of a split, the same on every process: see `evaluate.describe`."""
    return evaluate.describe(model, variables, images.image, mesh, config.eval_batch_size)


def _table(images, scores: np.ndarray, distances: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"id": id_, "defect": defect, "score": float(score), "distance": float(distance)}
        for id_, defect, score, distance in zip(images.id, images.defect, scores, distances)
    ]


def _one_line(metrics: dict[str, float | None]) -> str:
    shown = (f"{k} {'-' if v is None else f'{v:.4f}'}" for k, v in metrics.items())
    return ", ".join(shown)
