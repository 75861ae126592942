"""A run: for each category load the data, train, evaluate, write the results."""

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prn_jax import evaluate, results, thresholds
from prn_jax import mesh as meshes
from prn_jax import train as training
from prn_jax.checkpoints import Checkpoints
from prn_jax.errors import UserError
from prn_jax.identity import Identity, as_dict
from prn_jax.metrics import evaluate_maps, evaluate_rankings, rank_images, rank_pixels


def train_and_evaluate(
    config: ConfigDict, workdir: str, *, allow_config_change: bool = False
) -> dict[str, dict[str, float | None]]:
    """Trains and evaluates one category, or one after another with `config.category = "all"`.

    A category whose results are there is not run again; one that was interrupted goes on from its
    newest checkpoint.

    Args:
      config: see configs/default.py.
      workdir: `<workdir>/<category>` receives checkpoints, TensorBoard events and results;
        `<workdir>/results.{json,md}` the table.
      allow_config_change: go on from a checkpoint whose configuration differs.

    Returns:
      The metrics by category.

    Raises:
      UserError: see design of each part; nothing half-written is left.
    """
    config = checked(config)
    folder = epath.Path(workdir).expanduser()
    if "://" not in workdir:
        folder = folder.resolve()  # Orbax wants absolute paths
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={workdir}: {error.strerror or error}"
        ) from error
    meshes.cache_compilations()
    mesh = meshes.create_mesh()
    meshes.check_batch_size("batch_size", config.batch_size, mesh)
    names = categories(config)
    finished = {}
    for name in names:
        with config.unlocked():
            config.category = name
        finished[name] = _run_category(config, folder / name, mesh, allow_config_change)
    if meshes.is_main():
        results.write_table(folder, config.data.name)
        print(results.render_table(folder, config.data.name), flush=True)
        print(f"\nresults: {folder / 'results.md'}", flush=True)
    return finished


def checked(config: ConfigDict) -> ConfigDict:
    """A copy of the configuration whose fields are known to make sense.

    Raises:
      UserError: naming the field and what it should be.
    """
    config = config.copy_and_resolve_references()
    size = config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    size = size * 2 if len(size) == 1 else size
    if len(size) != 2 or any(not isinstance(x, int) or x < 32 or x % 32 for x in size):
        raise UserError(
            f"image_size={config.image_size}: give (height, width), each a multiple of 32"
        )
    with config.ignore_type(), config.unlocked():
        config.image_size = size
    positive = {
        "batch_size": config.batch_size,
        "eval_batch_size": config.eval_batch_size,
        "epochs": config.epochs,
        "score_pixels": config.score_pixels,
        "log_every": config.log_every,
        "checkpoint.keep": config.checkpoint.keep,
        "prototypes.iterations": config.prototypes.iterations,
        "optimizer.learning_rate": config.optimizer.learning_rate,
    }
    for field, value in positive.items():
        if value <= 0:
            raise UserError(f"{field}={value}: give a number greater than 0")
    if config.num_seen < 0:
        raise UserError(f"num_seen={config.num_seen}: give 0 or more")
    if not config.attention.divisions or min(config.attention.divisions) < 1:
        raise UserError(f"attention.divisions={config.attention.divisions}: give numbers >= 1")
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"dtype={config.dtype!r}: give auto, float32 or bfloat16")
    return config


def categories(config: ConfigDict) -> list[str]:
    """The categories to run: the one named, or all that are found."""
    from prn_jax import datasets

    if config.category != "all":
        return [config.category]
    found = datasets.available(config.data.name, config.data.manual_dir, config.data.data_dir)
    missing = [x for x in datasets.categories(config.data.name, config.data.manual_dir)
               if x not in found]  # fmt: skip
    if missing:
        logging.warning("not in %s, left out: %s", config.data.manual_dir, ", ".join(missing))
    return found


def _run_category(
    config: ConfigDict, folder: epath.Path, mesh: Mesh, allow_config_change: bool
) -> dict[str, float | None]:
    """Trains and evaluates `config.category`, unless its results are there."""
    if (folder / "results.json").exists():
        run = results.read_run(folder)
        if not allow_config_change:
            saved = Identity.from_json(run.get("identity") or run["config"])
            now = dataclasses.replace(saved, config=as_dict(config))
            saved.check(now, f"the finished run in {folder}")
        logging.info("%s: finished before, see %s", config.category, folder / "results.md")
        return run["metrics"]

    # TensorFlow is needed from here on: it reads the images.
    from prn_jax import input_pipeline

    began = time.monotonic()
    data = meshes.first_on_main(
        f"loading {config.category}", lambda: input_pipeline.load_category(config, config.category)
    )
    logging.info(
        "%s: %d normal and %d seen anomalous images to train, %d to test (%d of them anomalous)",
        config.category,
        len(data.train.id),
        len(data.seen.id),
        len(data.test.id),
        int(np.sum(data.test.label)),
    )

    def make_batches(start: int, steps: int) -> Iterable[dict[str, np.ndarray]]:
        return input_pipeline.train_batches(
            config,
            data,
            total_steps=steps,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    load_seconds = time.monotonic() - began
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    writer = _ScalarWriter(folder)

    def evaluate_during(step, model, variables):
        maps, scores = _predict(config, model, variables, data.test, mesh)
        metrics = evaluate_maps(maps, data.test.mask, scores, data.test.label)
        writer(step, {f"test/{k}": v for k, v in metrics.items() if v is not None})
        logging.info("step %d: %s", step, _one_line(metrics))

    identity = Identity(
        config.data.name,
        config.category,
        getattr(data, "fingerprint", ""),
        tuple(data.seen.id),
        training.total_steps(config, len(data.train)),
        getattr(data, "white_level", 0),
        as_dict(config),
    )
    try:
        trained = training.train(
            config,
            data.train.image,
            make_batches,
            checkpoints,
            mesh,
            identity,
            write_scalars=writer,
            evaluate=evaluate_during,
            allow_config_change=allow_config_change,
        )
    finally:
        writer.close()
        checkpoints.close()
    began = time.monotonic()
    maps, scores = _predict(config, trained.model, trained.variables, data.test, mesh)
    rankings = rank_images(scores, data.test.label), rank_pixels(maps, data.test.mask)
    metrics = evaluate_rankings(*rankings)
    chosen = thresholds.choose(
        scores,
        data.test.label,
        maps,
        data.test.mask,
        trained_on=lambda: _predict(config, trained.model, trained.variables, data.train, mesh),
    )
    timing = trained.timing | {
        "load_seconds": load_seconds,
        "evaluate_seconds": time.monotonic() - began,
    }
    if meshes.is_main():
        run = {
            "category": config.category,
            "dataset": config.data.name,
            "metrics": metrics,
            "thresholds": chosen,
            "steps": trained.step,
            "split": {"seed": config.split_seed, "seen": list(data.seen.id)},
            "test": _test_table(data.test, scores),
            "config": as_dict(config),
            "identity": identity.as_json(),
            "seed": config.seed,
            "provenance": results.provenance(),
            "timing": timing,
            "parameters": _count(trained.variables["params"]),
        }
        if len(data.test):
            _write_pictures(folder, data.test, maps, scores)
        # What decides lies beside what computes: a copy of the checkpoints is enough to predict.
        results.write_thresholds(checkpoints.folder, trained.step, chosen)
        results.write_predictions(folder, data.test.image, data.test.mask, maps)
        results.write_run(folder, run)
        logging.info("%s: %s", config.category, _one_line(metrics))
    meshes.barrier(f"{config.category} is evaluated")
    return metrics


def _predict(config, model, variables, images, mesh):
    """Maps and scores of a split, the same on every process."""
    return evaluate.predict(
        model,
        variables,
        images.image,
        mesh,
        batch_size=config.eval_batch_size,
        score_pixels=config.score_pixels,
    )


def _test_table(test, scores: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"id": id_, "defect": defect, "score": float(score)}
        for id_, defect, score in zip(test.id, test.defect, scores)
    ]


def _write_pictures(folder, test, maps, scores) -> None:
    from prn_jax import pictures

    sheet = pictures.results_sheet(
        test.image, test.mask, maps, scores, test.label, test.defect, test.id
    )
    pictures.save_png(folder / "results.png", sheet)


def _one_line(metrics: dict[str, float | None]) -> str:
    shown = (f"{k} {'-' if v is None else f'{v:.4f}'}" for k, v in metrics.items())
    return ", ".join(shown)


def _count(params: Any) -> int:
    return int(sum(x.size for x in jax.tree.leaves(params)))


class _ScalarWriter:
    """TensorBoard events through CLU, on process 0."""

    def __init__(self, folder: epath.Path):
        from clu import metric_writers

        self._writer = None
        if meshes.is_main():
            self._writer = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(folder)))

    def __call__(self, step: int, scalars: dict[str, float]) -> None:
        if self._writer is not None:
            self._writer.write_scalars(step, scalars)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
