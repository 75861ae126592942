"""A run: for each category load the data, train, evaluate, write the results."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from prn_jax import category, pretrained, results
from prn_jax import mesh as meshes
from prn_jax.checkpoints import check_name, holds_checkpoints, newest_identity
from prn_jax.errors import UserError, as_os_errors, shown, shown_first
from prn_jax.fields import checked
from prn_jax.identity import Identity, as_dict, lock
from prn_jax.splits import check_num_seen
from prn_jax.synthesis import textures


def train_and_evaluate(
    config: ConfigDict, workdir: str, *, allow_config_change: bool = False
) -> dict[str, dict[str, float | None]]:
    """Trains and evaluates one category, or one after another with `config.category = "all"`.

    A category whose results are there is not run again; one that was interrupted goes on from its
    newest checkpoint. Both only if data, seen anomalies and configuration are as they were: see
    `Identity`.

    Args:
      config: see configs/default.py.
      workdir: `<workdir>/<category>` receives checkpoints, TensorBoard events and results;
        `<workdir>/results.{json,md}` the table.
      allow_config_change: go on from what is there although it is made of something else: train
        what steps are left, and evaluate anew.

    Returns:
      The metrics by category.

    Raises:
      UserError: a field, a path or an image is wrong, or what is there is made of something else;
        nothing half-written is left.
    """
    config = checked(config)
    if not workdir:
        raise UserError("--workdir is empty: give a folder")
    folder = epath.Path(os.path.expanduser(workdir))
    if "://" not in workdir:
        folder = folder.resolve()  # Orbax wants absolute paths
    meshes.cache_compilations(folder)
    mesh = meshes.create_mesh()
    meshes.check_batch_size("batch_size", config.batch_size, mesh)
    meshes.barrier("the configuration is read")
    # Where the images are may differ; that they are the same is looked at when they are there.
    same = as_dict(config)
    del same["data"]["manual_dir"], same["data"]["data_dir"]
    meshes.require_same("fields (--config, --allow_config_change)", [same, allow_config_change])
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
        textures.check(config)
    try:
        with as_os_errors():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={shown(workdir)}: {error.strerror or error}"
        ) from error
    failed: dict[str, UserError] = {}
    for name in waiting:
        with config.unlocked():
            config.category = name
        try:
            with _locked(folder / name):
                metrics[name] = category.train_and_evaluate(
                    config, folder / name, mesh, allow_config_change
                )
        except UserError as error:
            # Of several processes the others may not know of it.
            if jax.process_count() > 1 or len(waiting) == 1:
                raise
            failed[name] = error
            logging.error("%s: %s; the other categories go on", name, error)
        if meshes.is_main() and name not in failed:
            results.write_table(folder, config.data.name)
    if failed:
        some, last = list(failed), next(reversed(failed.values()))
        raise UserError(
            f"{len(some)} of {len(names)} categories failed ({shown_first(some)}), which the same "
            f"command tries again; the last one: {last}"
        )
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
    # Where they lie as before, the run itself will look at them.
    moved = saved.config.get("synthesis", {}).get("textures") != config.synthesis.textures
    found = textures.fingerprint(config) if moved else saved.textures
    now = saved.today(config, fingerprint, found)
    saved.check(now, where, step, allow_config_change)
    return None if saved.differences(now) else run


def _fingerprint(config: ConfigDict) -> str:
    """Of the data of `config.category`; where there is none, the error says where to get it."""
    from prn_jax import datasets

    where = {"manual_dir": config.data.manual_dir, "data_dir": config.data.data_dir}
    return datasets.fingerprint(config.data.name, config.category, **where)


def _check_num_seen(config: ConfigDict) -> None:
    """Before anything is trained, as far as the names of the files tell."""
    from prn_jax import datasets

    if not config.num_seen:
        return
    counts = datasets.count_anomalous(config.data.name, config.category, config.data.manual_dir)
    if counts is not None:
        check_num_seen(config.num_seen, config.category, *counts)


def _finished_metrics(config, folder, allow_config_change) -> dict[str, float | None] | None:
    from prn_jax import datasets

    if "://" not in os.fspath(folder):
        datasets.check_outside(folder, "--workdir", config.data.name, config.data.manual_dir)
    config = config.copy_and_resolve_references()
    config.category = folder.name
    run = finished(config, folder, allow_config_change)
    if run is None:
        _fingerprint(config)
        _check_num_seen(config)
        return None
    logging.info("%s: finished before, see %s", folder.name, shown(folder / "results.json"))
    return run["metrics"]


@contextlib.contextmanager
def _locked(folder: epath.Path) -> Iterator[None]:
    """Process 0 holds the folder; where another run does, no process goes on."""
    with contextlib.ExitStack() as held:
        meshes.from_main(f"locking {folder.name}", lambda: held.enter_context(lock(folder)))
        yield
