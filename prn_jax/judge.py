"""A trained network judged on other images: another day's, another split, another line's."""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from prn_jax import disk, evaluate, images, pictures, results, thresholds, trained_on
from prn_jax.checkpoints import check_outside
from prn_jax.datasets import layout
from prn_jax.errors import UserError, shown, shown_first
from prn_jax.identity import as_dict
from prn_jax.masks import resize_mask
from prn_jax.predict import Detector
from prn_jax.splits import (
    Images,
    copies_within,
    leave_out,
    read_split,
    say_both,
    say_unmarked,
    within,
)

Evaluation = dict[str, Any]


# --- which images ---------------------------------------------------------------------------------


def read_folder(folder: pathlib.Path, detector: Detector) -> Images:
    """Reads a product's folder as prediction reads images.

    Args:
      folder: `test/good`, `test/<defect>` and `ground_truth/<defect>`, as in docs/datasets.md;
        `train/good`, where there is one, is read too.
      detector: whose image size and white level count.

    Raises:
      UserError: there are no images, or one or its mask is wrong.
    """
    stray: list[pathlib.Path] = []
    examples = layout.scan_folders(
        folder, stray, normal=layout.GOOD, suffixes=("_mask", ""), needs_masks=False
    )
    if not examples:
        raise UserError(
            f"--images={shown(folder)}: no images in test/good or test/<defect> there; put them "
            "as docs/datasets.md shows"
        )
    if stray:
        logging.warning("skipped %s", images.describe_skipped(stray))
    examples.sort(key=lambda x: x.id)
    size, count = detector.image_size, len(examples)
    pixels, masks = disk.zeros((count, *size, 3), np.uint8), disk.zeros((count, *size), np.uint8)
    for number, example in enumerate(examples):
        image = images.read_array(example.image, detector.white_level)
        pixels[number] = images.resize(image, size)
        masks[number] = resize_mask(layout.read_mask(example, image.shape[:2]), size)
    found = Images(pixels, masks, [x.defect for x in examples], [x.id for x in examples])
    unmarked = [x for x, known in zip(found.id, found.has_mask) if not known]
    what = "%d anomalous images have no mask, or one of which nothing is left at this size"
    say_unmarked(detector.config.category, what, unmarked, also="")
    inverted = [x.mask for x, mask in zip(examples, masks) if layout.seems_inverted(mask)]
    if inverted:
        logging.warning("%s: %s", layout.INVERTED, shown_first(inverted))
    for path in layout.out_of_place(folder, ()):
        if images.is_region(path):
            logging.warning(
                "%s is not read: the checkpoint's region of interest counts", shown(path)
            )
    return found


def read_own(detector: Detector, split: str, manual_dir: str | None) -> Images:
    """Reads a split of the data set that the network was trained on.

    Args:
      detector: from `predict.load`.
      split: train or test.
      manual_dir: where its raw files are now; None: where they were.

    Raises:
      UserError: the data is not there, is wrong, has another white, or no such split.
    """
    from prn_jax import datasets

    data = detector.config.data
    builder = datasets.prepare(
        data.name,
        detector.config.category,
        manual_dir=data.manual_dir if manual_dir is None else manual_dir,
        data_dir=data.data_dir,
    )
    detector.identity.check_white(
        int((builder.info.metadata or {}).get("white_level", 0)),
        f"{data.name} {detector.config.category} has changed since the training",
        "Put the images back, or give their folder as --images",
    )
    found = read_split(builder, split, detector.image_size)
    if not len(found):
        raise UserError(f"--split={split}: {data.name} {detector.config.category} has none")
    return found


def leave_out_trained(found: Images, detector: Detector) -> Images:
    """What the network was not trained on, each image once; says what it leaves out.

    Raises:
      UserError: nothing is left.
    """
    known, seen = trained_on.recall(detector.folder), detector.identity.seen
    if known is None:
        logging.warning(
            "the training kept no record of its images: those in train/ and those named as its "
            "seen anomalies are left out; a copy under another name is not noticed"
        )
        trained = [x in seen or x.startswith("train/") for x in found.id]
    else:
        trained = [digest in known for digest in found.digests]
    left = leave_out(found, trained, "images were trained on")
    if not len(left):
        raise UserError("all these images were trained on: give others to judge the network on")
    left = leave_out(left, copies_within(left), "images are copies of others of them")
    say_both(left)
    return left


# --- the judgement --------------------------------------------------------------------------------


def judge(detector: Detector, found: Images, progress: bool = False) -> tuple[Evaluation, Callable]:
    """Metrics, and what the stored thresholds and thresholds chosen on these images do.

    Args:
      detector: from `predict.load`.
      found: images that it was not trained on.
      progress: show a bar.

    Returns:
      `metrics` as in a training's results; `thresholds` by name (`stored`, `measured`): the figures
      of `at_thresholds`; `chosen_by`: how many of these images the stored ones were chosen by;
      `images`: id, defect and score of each. And what draws its sheet.
    """
    roi = detector.roi
    inside = slice(None) if roi is None else roi > 0
    found = found if roi is None else within(found, roi, detector.config.category)
    maps, scores, _ = evaluate.predict(
        detector.model,
        detector.variables,
        found.image,
        detector.mesh,
        batch_size=detector.config.eval_batch_size,
        score_pixels=detector.config.score_pixels,
        progress=progress,
    )
    label = found.label
    metrics = evaluate.metrics_of(found, maps, scores, roi)
    chosen = {"stored": detector.thresholds}
    known = trained_on.judged_on(detector.folder) if detector.thresholds else {}
    if (label == 0).any():  # Without normal images nothing but those that were trained on is left.
        chosen["measured"] = thresholds.choose(
            scores,
            label,
            maps[:, inside],
            found.mask[:, inside],
            trained_on=lambda: (maps, scores),
        )
    evaluation = {
        "category": detector.config.category,
        "step": detector.step,
        "metrics": metrics,
        "thresholds": {
            name: at_thresholds(x["image"], x["pixel"], found, maps, scores)
            for name, x in chosen.items()
            if x
        },
        "chosen_by": sum(x in known for x in found.digests) if known else 0,
        "images": [
            {"id": id_, "defect": defect, "score": float(score)}
            for id_, defect, score in zip(found.id, found.defect, scores)
        ],
        "config": as_dict(detector.config),
        "provenance": results.provenance(),
    }

    def sheet():
        return pictures.results_sheet(found, maps, scores)

    return evaluation, sheet


def at_thresholds(
    image: float, pixel: float, found: Images, maps: np.ndarray, scores: np.ndarray
) -> dict[str, Any]:
    """What a pair of thresholds does.

    Args:
      image: score from which an image is called anomalous.
      pixel: value from which a pixel is.
      found: the images, [n].
      maps: [n, h, w].
      scores: [n].

    Returns:
      `image` and `pixel` themselves; `recall`, the share of the anomalous images that are called
      so, over all and by defect in `recalls`; `false_alarms`, that of the normal ones; `precision`;
      and `pixel_f1`. In [0, 1]; None where there is nothing to divide by.
    """
    called, label = scores >= image, found.label == 1
    defects = np.array(found.defect)
    marked, called_pixels = found.mask[found.has_mask] > 0, maps[found.has_mask] >= pixel
    hits = 2 * int((marked & called_pixels).sum())
    return {
        "image": float(image),
        "pixel": float(pixel),
        "recall": _share(called[label]),
        "recalls": {str(x): _share(called[defects == x]) for x in sorted(set(defects[label]))},
        "false_alarms": _share(called[~label]),
        "precision": _share(label[called]),
        "pixel_f1": hits / total if (total := int(marked.sum() + called_pixels.sum())) else None,
    }


def _share(chosen: np.ndarray) -> float | None:
    return float(chosen.mean()) if len(chosen) else None


# --- what is written ------------------------------------------------------------------------------


def prepare(output: str | os.PathLike) -> None:
    """Makes the folder of what `write` writes.

    Raises:
      UserError: it cannot be made or written to, or lies among a run's checkpoints.
    """
    check_outside(output, "--output")
    folder = epath.Path(os.path.expanduser(output))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "://" not in os.fspath(folder):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to --output={shown(output)}: {error.strerror}") from error


def write(output: epath.PathLike, evaluation: Evaluation, sheet: Callable) -> epath.Path:
    """Writes `evaluation.json`, `evaluation.md` and `evaluation.png`; returns the second."""
    output = epath.Path(os.path.expanduser(output))
    text = json.dumps(evaluation, indent=2, sort_keys=True, allow_nan=False) + "\n"
    disk.write_file(output / "evaluation.json", text)
    pictures.save_png(output / "evaluation.png", sheet())
    disk.write_file(output / "evaluation.md", render(evaluation))
    return output / "evaluation.md"


def render(evaluation: Evaluation) -> str:
    """The evaluation as a page of Markdown tables, in percent."""
    scores = evaluation["images"]
    normal = sum(x["defect"] == layout.GOOD for x in scores)
    lines = [
        f"# {evaluation['category']}: {len(scores)} other images",
        "",
        f"{normal} normal, {len(scores) - normal} anomalous; the checkpoint of step "
        f"{evaluation['step']}. In percent.",
        "",
        *results.markdown(
            list(results.COLUMNS.values()),
            [[results.percent(evaluation["metrics"][x]) for x in results.COLUMNS]],
        ),
        "",
    ]
    found = evaluation["thresholds"]
    heads = ["thresholds", "image", "pixel", "recall", "false alarms", "precision", "pixel F1"]
    shares = ("recall", "false_alarms", "precision", "pixel_f1")
    lines += results.markdown(heads, [
        [name, f"{x['image']:.4f}", f"{x['pixel']:.4f}", *(results.percent(x[y]) for y in shares)]
        for name, x in found.items()
    ])  # fmt: skip
    if evaluation["chosen_by"]:
        lines += [
            "",
            f"The stored thresholds were chosen by {evaluation['chosen_by']} of these images: "
            "their row says nothing of new ones.",
        ]
    defects = sorted({x["defect"] for x in scores} - {layout.GOOD})
    if defects:
        lines += ["", *results.markdown(["recall of", "images", *found], [
            [x, str(sum(row["defect"] == x for row in scores)),
             *(results.percent(y["recalls"][x]) for y in found.values())]
            for x in defects
        ])]  # fmt: skip
    return "\n".join(lines) + "\n"
