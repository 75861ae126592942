"""A run: for each category load the data, train, evaluate, write the results."""

import contextlib
import functools
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from clu.parameter_overview import count_parameters
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prn_jax import evaluate, explain, pretrained, results, thresholds, trained_on
from prn_jax import mesh as meshes
from prn_jax import train as training
from prn_jax.checkpoints import Checkpoints, check_name, holds_checkpoints, newest_identity
from prn_jax.errors import UserError, as_os_errors, shown
from prn_jax.fields import checked
from prn_jax.identity import Identity, as_dict, lock
from prn_jax.metrics import evaluate_rankings, rank_images, rank_pixels
from prn_jax.tiles import Tiling


def train_and_evaluate(
    config: ConfigDict, workdir: str, *, allow_config_change: bool = False
) -> dict[str, dict[str, float | None]]:
    """Trains and evaluates one category, or one after another with `config.category = "all"`.

    A category whose results are there is not run again; one that was interrupted goes on from its
    newest checkpoint. Either only if it is made of the same.

    Args:
      config: see configs/default.py.
      workdir: `<workdir>/<category>` receives checkpoints, TensorBoard events and results;
        `<workdir>/results.{json,md}` the table.
      allow_config_change: go on from what is there although it is made of something else: train
        what steps are left, and evaluate anew.

    Returns:
      The metrics by category.

    Raises:
      UserError: see design of each part; nothing half-written is left.
    """
    config = checked(config)
    folder = epath.Path(os.path.expanduser(workdir))
    if "://" not in workdir:
        folder = folder.resolve()  # Orbax wants absolute paths
    meshes.cache_compilations()
    mesh = meshes.create_mesh()
    meshes.check_batch_size("batch_size", config.batch_size, mesh)
    names = meshes.from_main("finding the categories", lambda: categories(config))
    metrics = {}
    for name in names:
        check_name(folder / name)
        check = functools.partial(_finished_metrics, config, folder / name, allow_config_change)
        metrics[name] = meshes.from_main(f"looking for {name}", check)
    waiting = [name for name in names if metrics[name] is None]
    # A run that goes on from a checkpoint has the backbone's weights in it.
    if not all(holds_checkpoints(folder / name / "checkpoints") for name in waiting):
        pretrained.check(config)
    try:
        with as_os_errors():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={shown(workdir)}: {error.strerror or error}"
        ) from error
    for name in waiting:
        with config.unlocked():
            config.category = name
        with _locked(folder / name):
            metrics[name] = _run_category(config, folder / name, mesh, allow_config_change)
    if meshes.is_main():
        results.write_table(folder, config.data.name)
        print(results.render_table(folder, config.data.name), flush=True)
        print(f"\nresults: {shown(folder / 'results.md')}", flush=True)
    return metrics


def categories(config: ConfigDict) -> list[str]:
    """The categories to run: the one named, or all that are found."""
    from prn_jax import datasets

    if config.category != "all":
        return [config.category]
    return datasets.all_categories(config.data.name, config.data.manual_dir, config.data.data_dir)


def finished(
    config: ConfigDict, folder: epath.Path, allow_config_change: bool = False
) -> dict[str, Any] | None:
    """A category's run that came to its end, made of what `config` and the data are now.

    Args:
      config: of the run; `config.category` is named.
      folder: the category's.
      allow_config_change: one that is made of something else does not count.

    Raises:
      UserError: the data is not there, or the run, finished or not, is made of something else.
    """
    run = results.read_run(folder) if (folder / "results.json").exists() else None
    if run:
        saved = Identity.of_run(run)
        step, where = saved.steps, f"the finished run in {shown(folder)}"
        fingerprint = _fingerprint(config) if saved.fingerprint else ""
    elif begun := newest_identity(folder / "checkpoints"):
        step, saved = begun
        where = f"the checkpoint of step {step} in {shown(folder / 'checkpoints')}"
        fingerprint = saved.fingerprint  # what changed in the images the run itself will name
    else:
        return None
    now = saved.today(config, fingerprint)
    saved.check(now, where, step, allow_config_change)
    return None if saved.differences(now) else run


def _fingerprint(config: ConfigDict) -> str:
    """Of the data of `config.category`; where there is none, the error says where to get it."""
    from prn_jax import datasets

    where = {"manual_dir": config.data.manual_dir, "data_dir": config.data.data_dir}
    return datasets.fingerprint(config.data.name, config.category, **where)


def _finished_metrics(config, folder, allow_config_change) -> dict[str, float | None] | None:
    config = config.copy_and_resolve_references()
    config.category = folder.name
    run = finished(config, folder, allow_config_change)
    if run is None:
        _fingerprint(config)
        return None
    logging.info("%s: finished before, see %s", folder.name, shown(folder / "results.json"))
    return run["metrics"]


@contextlib.contextmanager
def _locked(folder: epath.Path) -> Iterator[None]:
    """Process 0 holds the folder; where another run does, no process goes on."""
    with contextlib.ExitStack() as held:
        meshes.from_main(f"locking {folder.name}", lambda: held.enter_context(lock(folder)))
        yield


def _run_category(
    config: ConfigDict, folder: epath.Path, mesh: Mesh, allow_config_change: bool
) -> dict[str, float | None]:
    """Trains and evaluates `config.category`."""
    # TensorFlow is needed from here on: it reads the images.
    from prn_jax import board, input_pipeline

    began = time.monotonic()
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
    writer = board.create_writer(folder)
    board.write_config(writer, config)

    def evaluate_during(step, model, variables):
        maps, scores, _ = _predict(config, model, variables, data.test, mesh)
        metrics = evaluate_rankings(*_rankings(data, maps, scores))
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
    )

    def remember(resumed):
        parts = data.train, data.seen, data.test
        meshes.from_main(
            "the record of what is trained on",
            lambda: trained_on.remember(checkpoints.folder, *parts, resumed),
        )

    try:
        trained = training.train(
            config,
            data.train.image,
            make_batches,
            checkpoints,
            mesh,
            identity,
            write_scalars=writer.write_scalars,
            accepted=remember,
            describe=functools.partial(board.write_parameters, writer),
            actions=board.profile(config, folder, identity.steps),
            evaluate=evaluate_during,
            allow_config_change=allow_config_change,
            roi=data.roi,
        )
    finally:
        checkpoints.close()
        writer.close()
    began = time.monotonic()
    predict = functools.partial(_predict, config, trained.model, trained.variables, mesh=mesh)
    maps, scores, distances = predict(data.test)
    held = predict(data.held)
    some_normals = data.train.pick(explain.kept(len(data.train)))
    describe = functools.partial(_describe, config, trained.model, trained.variables, mesh=mesh)
    normals = explain.Normals.of(some_normals.id, some_normals.image, describe(some_normals))
    nearest = normals.nearest(describe(data.test))
    metrics = evaluate_rankings(*_rankings(data, maps, scores))
    inside = slice(None) if data.roi is None else data.roi > 0
    chosen = thresholds.choose(
        scores,
        data.test.label,
        maps[:, inside],
        data.test.mask[:, inside],
        trained_on=lambda: _inside(predict(some_normals), inside),
        held=_inside(held, inside),
        distances=(distances, held[2]),
    )
    rates = config.thresholds.false_alarms
    rates = thresholds.at_rates(chosen, rates, scores, data.test.label)
    timing = trained.timing | {
        "load_seconds": load_seconds,
        "evaluate_seconds": time.monotonic() - began,
    }
    if meshes.is_main():
        run = {
            "category": config.category,
            "dataset": config.data.name,
            "metrics": metrics,
            "thresholds": {x: chosen[x] for x in ("image", "pixel", "distance", "basis")}
            | {"rates": rates},
            "steps": trained.identity.steps,
            "split": {
                "seed": config.split_seed,
                "seen": list(data.seen.id),
                "held": list(data.held.id),
            },
            "test": [
                row | {"nearest": normals.id[number]}
                for row, number in zip(_table(data.test, scores, distances), nearest, strict=True)
            ],
            "held": _table(data.held, *held[1:]),
            "config": as_dict(config),
            "identity": trained.identity.as_json(),
            "seed": config.seed,
            "provenance": results.provenance(),
            "timing": timing,
            "parameters": int(count_parameters(trained.variables["params"])),
        }
        if len(data.test):
            _write_pictures(folder, data.test, maps, scores)
            with contextlib.closing(board.create_writer(folder)) as writer:
                board.write_test(writer, trained.identity.steps, data.test, maps, metrics)
        # What decides lies beside what computes: a copy of the checkpoints is enough to predict.
        deciding = chosen | {"score_pixels": config.score_pixels}
        results.write_thresholds(checkpoints.folder, trained.identity.steps, deciding)
        normals.write(checkpoints.folder)
        results.write_predictions(folder, data.test.image, data.test.mask, maps, data.roi)
        results.write_run(folder, run)
        logging.info("%s: %s", config.category, _one_line(metrics))
        thresholds.log_rates(rates)
    meshes.barrier(f"{config.category} is evaluated")
    return metrics


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


def _describe(config, model, variables, images, mesh):
    """Of a split, the same on every process: see `evaluate.describe`."""
    return evaluate.describe(model, variables, images.image, mesh, config.eval_batch_size)


def _inside(predicted, inside):
    """Maps, [n, p] of the region of interest, and scores."""
    maps, scores, _ = predicted
    return maps[:, inside], scores


def _rankings(data, maps, scores):
    """Of the images, and of the pixels of those whose mask is known."""
    test = data.test
    pixels = rank_pixels(maps, test.mask, data.roi, test.has_mask)
    return rank_images(scores, test.label), pixels


def _table(images, scores: np.ndarray, distances: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"id": id_, "defect": defect, "score": float(score), "distance": float(distance)}
        for id_, defect, score, distance in zip(images.id, images.defect, scores, distances)
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
