"""What TensorBoard shows of a training, by CLU: scalars, fields, parameters, images, a profile."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from clu import asynclib, metric_writers, parameter_overview, periodic_actions
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from prn_jax import mesh as meshes
from prn_jax import pictures
from prn_jax.identity import as_dict
from prn_jax.splits import Images

_EXAMPLES = 8
_SIDE = 128  # pixels, the longer one


class _Events:
    """CLU's writer; where its events cannot be written, that is said once and the run goes on."""

    def __init__(self, writer: metric_writers.MetricWriter):
        self._writer = writer

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._writer, name)

        @functools.wraps(method)
        def lenient(*args, **kwargs):
            try:
                return method(*args, **kwargs)
            except asynclib.AsyncError as error:
                what = "TensorBoard's events cannot be written: %s"
                logging.log_first_n(logging.WARNING, what, 1, error.__cause__)

        return lenient


def create_writer(folder: epath.PathLike) -> metric_writers.MetricWriter:
    """The writer of a category's events, which process 0 writes; to be closed."""
    return _Events(metric_writers.create_default_writer(folder, just_logging=not meshes.is_main()))


def write_config(writer: metric_writers.MetricWriter, config: ConfigDict) -> None:
    """Writes the configuration as hyper-parameters: what is no number or truth value as text."""
    fields = parameter_overview.flatten_dict(as_dict(config), delimiter=".")
    known = (bool, int, float, str)
    writer.write_hparams({k: v if isinstance(v, known) else str(v) for k, v in fields.items()})


def write_parameters(writer: metric_writers.MetricWriter, params: Any) -> None:
    """One line of the trained parameters by block, and the table of all of them as a text."""
    counts: dict[str, int] = {}
    for name, tree in params.items():
        block = name.split("_")[0]
        counts[block] = counts.get(block, 0) + parameter_overview.count_parameters(tree)
    logging.info(
        "%s trained parameters: %s",
        f"{sum(counts.values()):,}",
        ", ".join(f"{block} {count:,}" for block, count in counts.items()),
    )
    table = parameter_overview.get_parameter_overview(params, include_stats=False)
    rows = [line.replace("+", "|") for line in table.splitlines()[1:] if line[:1] in "+|"]
    writer.write_texts(0, {"parameters": "\n".join(rows[:-1])})


def write_test(
    writer: metric_writers.MetricWriter,
    step: int,
    test: Images,
    maps: np.ndarray,
    metrics: dict[str, float | None],
) -> None:
    """Writes an evaluation's metrics and a few test images, the same at each step.

    An image is shown with its mask outlined, and beside it with its anomaly map.

    Args:
      writer: from `create_writer`.
      step: of the training.
      test: the test split.
      maps: anomaly maps, float32 [n, h, w].
      metrics: None where there are none.
    """
    writer.write_scalars(step, {f"test/{k}": v for k, v in metrics.items() if v is not None})
    by_defect: dict[str, list[int]] = {}
    for i, defect in enumerate(test.defect):
        by_defect.setdefault(defect, []).append(i)
    turns = itertools.zip_longest(*(indices for _, indices in sorted(by_defect.items())))
    chosen = [i for turn in turns for i in turn if i is not None][:_EXAMPLES]
    drawn = {test.id[i]: _example(test.image[i], test.mask[i], maps[i]) for i in chosen}
    writer.write_images(step, drawn)


def _example(image: np.ndarray, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    pair = [pictures.outline(image, mask), pictures.overlay(image, values)]
    scale = min(1.0, _SIDE / max(mask.shape))
    size = tuple(max(1, round(x * scale)) for x in mask.shape[::-1])
    return np.concatenate([np.asarray(Image.fromarray(x).resize(size)) for x in pair], axis=1)


def profile(config: ConfigDict, folder: epath.PathLike, steps: int) -> list[Callable[[int], Any]]:
    """What is called after each step to record the profile that `config.profile` asks for.

    Args:
      config: see configs/default.py.
      folder: of the events.
      steps: of the whole training: the profile ends before it does.
    """
    first = config.profile.first_step
    count = min(config.profile.steps, steps - first)
    if not first or not meshes.is_main():
        return []
    if count < 1:
        logging.warning("profile.first_step=%d: the training ends before that", first)
        return []
    return [
        periodic_actions.Profile(
            logdir=folder, num_profile_steps=count, profile_duration_ms=None, first_profile=first,
            every_secs=None,
        )
    ]  # fmt: skip
