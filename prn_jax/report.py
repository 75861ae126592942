"""One self-contained page of a work folder: tables, curves, and every test image to look at."""

import base64
import html
import importlib.resources
import io
import json
import os
import string
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from prn_jax import disk, explain, metrics, pictures, results
from prn_jax.errors import UserError, shown
from prn_jax.identity import settings
from prn_jax.splits import Images
from prn_jax.tiles import Tiling

# Longest side of a test image on the page, in pixels.
_SIDE = 192
# Points of a curve: more than the page can show.
_POINTS = 300
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 260, 180, 34, 26

Run = dict[str, Any]
Line = tuple[str, np.ndarray, np.ndarray]


def write_report(workdir: epath.PathLike, path: epath.PathLike, progress: bool = False) -> None:
    """Writes the report of a training's or a study's work folder.

    Args:
      workdir: `--workdir` of the training (`<category>/results.json` below it) or of the study
        (`[<variation>,]seed_<n>/<category>/results.json`).
      path: the HTML file.
      progress: show a bar.

    Raises:
      UserError: there are no results, or they are damaged.
    """
    runs = find_runs(workdir)
    data = []
    for name, folder, run in tqdm(runs, unit="run", disable=not progress, dynamic_ncols=True):
        data.append(_run_data(name, folder, run))
    dataset = runs[0][2]["dataset"]
    notes = "The last checkpoint counts; the seen anomalies are not in the test split."
    if dataset in results.PAPER:
        notes += (
            " Small figures: ours minus the paper's, in points. The paper's PRO and AP per "
            "category are unconfirmed, and so is carpet's image AUROC."
        )
    configs = [run["config"] for *_, run in runs]
    alike = all(settings(config) == settings(configs[0]) for config in configs)
    if not alike:
        notes += " No means: the runs differ in more than category and seed."
    kinds = [f"{results.network(x)}, {Tiling.of(ConfigDict(x))} pixels" for x in configs]
    shared = f": {kinds[0]}" if len(set(kinds)) == 1 else ""
    template = string.Template(
        (importlib.resources.files("prn_jax") / "report.html").read_text("utf-8")
    )
    page = template.substitute(
        title=html.escape(f"PRN on {dataset}"),
        subtitle=html.escape(
            f"{len(runs)} run{'' if len(runs) == 1 else 's'}{shared}. In percent."
        ),
        table=_table([(name, run) for name, _, run in runs], alike),
        notes=html.escape(notes),
        # Inside of a script element "</" could end it, and "<!--<script" what follows it.
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    )
    disk.write_file(epath.Path(path), page)


def _folders(folder: epath.Path) -> list[epath.Path]:
    # No glob: etils takes `[2]` in the name of a folder for a part of the pattern.
    try:
        return sorted(x for x in folder.iterdir() if x.is_dir())
    except PermissionError:
        logging.warning("skipped %s: it may not be read", shown(folder))
        return []


def find_runs(workdir: epath.PathLike) -> list[tuple[str, epath.Path, Run]]:
    """All finished runs below a work folder: name, folder and `results.json`'s content.

    Raises:
      UserError: there are none, or one is damaged.
    """
    root = epath.Path(os.path.expanduser(workdir))
    found = []
    first = _folders(root) if root.is_dir() else []
    for folder in (*first, *(x for run in first for x in _folders(run))):
        if not results.is_run(folder):
            continue
        name = "/".join(folder.parts[len(root.parts) :])
        found.append((name, folder, results.read_run(folder)))
    if not found:
        above = f", {shown(root.parent)}" if results.is_run(root) else ""
        raise UserError(
            f"no results below {shown(workdir)}: give the --workdir of a finished training{above}"
        )
    return found


def _run_data(name: str, folder: epath.Path, run: Run) -> dict[str, Any]:
    """What the page's script shows of one run."""
    test, maps, roi = results.read_predictions(folder)
    images = []
    for entry, image, mask, values in zip(run["test"], test.image, test.mask, maps):
        images.append(
            {
                **entry,
                "image": _embed(pictures.outline(image, mask)),
                "map": _embed(pictures.overlay(image, values)),
            }
        )
    height, width = Tiling.of(ConfigDict(run["config"])).size
    device = run["provenance"]["device"]
    took = ""
    if run["timing"]["train_steps"] == run["steps"]:  # not resumed
        took = f" in {run['timing']['train_seconds'] / 60:.0f} min"
    about = (
        f"{results.network(run['config'])}; {run['steps']} steps of "
        f"{run['config']['batch_size']} images, seed {run['seed']}, "
        f"split seed {run['split']['seed']}, {len(run['split']['seen'])} seen anomalies; "
        f"{len(images)} test images; trained on {device['count']} x {device['kind']}{took}"
    )
    provenance = {
        key: run[key]
        for key in ("provenance", "timing", "parameters", "thresholds", "split", "config")
    }
    return {
        "name": name,
        "about": about,
        "threshold": run["thresholds"]["image"],
        "rates": run["thresholds"].get("rates", []),
        "distance": run["thresholds"].get("distance"),
        "normals": _normals(folder, run),
        "width": width,
        "height": height,
        "images": images,
        "charts": _charts(folder, run, test, maps, roi),
        "provenance": json.dumps(provenance, indent=2),
    }


def _normals(folder: epath.Path, run: Run) -> dict[str, str]:
    """The normal training images that test images are most like, by their ids."""
    wanted = {entry["nearest"] for entry in run["test"] if "nearest" in entry}
    if not wanted:
        return {}
    normals = explain.read(folder)
    return {x: _embed(normals.picture(i)) for i, x in enumerate(normals.id) if x in wanted}


def _embed(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=70, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- the table ------------------------------------------------------------------------------------


def _table(runs: Sequence[tuple[str, Run]], with_mean: bool) -> str:
    papers = [results.PAPER.get(run["dataset"], {}).get(run["category"]) for _, run in runs]
    heads = "".join(f"<th scope=col>{title}</th>" for title in results.COLUMNS.values())
    rows = []
    for (name, run), paper in zip(runs, papers):
        link = f'<a href="#{urllib.parse.quote(name, safe="")}">{html.escape(name)}</a>'
        rows.append(f"<tr><td>{link}</td>{_cells(run['metrics'], paper)}")
    # Over the categories, as the paper's, however many seeds each has.
    seeds: dict[str, list] = {}
    for _, run in runs:
        seeds.setdefault(run["category"], []).append(run["metrics"])
    same = results.paper_mean(list(seeds), runs[0][1]["dataset"])
    if with_mean:
        mean = results.mean([results.mean(x) for x in seeds.values()])
        rows.append(f'<tr class="mean"><td>mean</td>{_cells(mean, same)}')
    if with_mean and same:
        rows.append(f"<tr><td>paper, the same</td>{_cells(same, None)}")
    return f"<table><tr><th scope=col>run</th>{heads}</tr>{'</tr>'.join(rows)}</tr></table>"


def _cells(figures: dict[str, float | None], paper: dict[str, float] | None) -> str:
    cells = []
    for column in results.COLUMNS:
        value, theirs = figures.get(column), (paper or {}).get(column)
        difference = ""
        if value is not None and theirs is not None:
            difference = f"<small>{100 * (value - theirs):+.1f}</small>"
        cells.append(f"<td>{results.percent(value)}{difference}</td>")
    return "".join(cells)


# --- charts, as SVG -------------------------------------------------------------------------------


def _charts(
    folder: epath.Path, run: Run, test: Images, maps: np.ndarray, roi: np.ndarray | None
) -> str:
    scores = np.array([entry["score"] for entry in run["test"]])
    charts = [_histogram(scores, test.label > 0)]
    rankings = [
        ("images", metrics.rank_images(scores, test.label)),
        ("pixels", metrics.rank_pixels(maps, test.mask, roi, test.has_mask)),
    ]

    def curves(curve) -> list[Line]:
        drawn = [(name, curve(ranking, _POINTS)) for name, ranking in rankings]
        return [(name, *points) for name, points in drawn if points is not None]

    charts += [
        _chart("ROC", curves(metrics.roc_curve), "false positive rate", "recall", (0, 1), (0, 1)),
        _chart(
            "Precision and recall",
            curves(metrics.precision_recall_curve),
            "recall",
            "precision",
            (0, 1),
            (0, 1),
        ),
    ]
    pro = metrics.pro_curve(rankings[1][1], 4 * _POINTS)
    lines = [] if pro is None else [("pixels", *pro)]
    limit = metrics.PRO_FPR_LIMIT
    charts.append(_chart("PRO", lines, "false positive rate", "overlap", (0, limit), (0, 1)))
    if run["steps"]:  # else nothing was trained
        charts.append(_training(folder))
    return "".join(charts)


def _histogram(scores: np.ndarray, labels: np.ndarray) -> str:
    if not len(scores):
        return _figure("Scores", "", [])
    low, high = float(scores.min()), float(scores.max())
    edges = np.linspace(low, max(high, low + 1e-6), 31)
    counts = [np.histogram(scores[labels == kind], edges)[0] for kind in (False, True)]
    top = max(1, max(c.max() for c in counts))
    bars = []
    for css, count in zip(("fa", "fb"), counts):
        x, width = np.linspace(0, _WIDTH, 31)[:-1], _WIDTH / 30
        bars += [
            f'<rect class="{css}" x="{_LEFT + x[i]:.1f}" y="{_HEIGHT * (1 - c / top):.1f}" '
            f'width="{width - 0.5:.1f}" height="{_HEIGHT * c / top:.1f}"/>'
            for i, c in enumerate(count)
            if c
        ]
    body = _axes("score", "images", (low, high), (0, float(top))) + "".join(bars)
    return _figure("Scores", body, ["normal", "anomalous"])


def _chart(title: str, lines: list[Line], x_name: str, y_name: str, x_range, y_range) -> str:
    body = _axes(x_name, y_name, x_range, y_range)
    for css, (_, x, y) in zip("ab", lines):
        if x.max() > x_range[1]:  # the curve goes on to the edge
            x, y = np.append(x, x_range[1]), np.append(y, np.interp(x_range[1], x, y))
        inside = (x >= x_range[0]) & (x <= x_range[1])
        points = " ".join(
            f"{_LEFT + _WIDTH * (a - x_range[0]) / (x_range[1] - x_range[0]):.1f},"
            f"{_HEIGHT * (1 - (b - y_range[0]) / (y_range[1] - y_range[0])):.1f}"
            for a, b in zip(x[inside], y[inside])
        )
        body += f'<polyline class="{css}" points="{points}"/>'
    return _figure(title, body, [name for name, *_ in lines])


def _training(folder: epath.Path) -> str:
    """Losses over steps, from the TensorBoard events, on a logarithmic axis."""
    lines = []
    for tag in ("loss", "focal"):
        steps, values = _read_scalars(folder, tag)
        if len(steps) > 1:
            lines.append((tag, steps, np.log10(np.maximum(values, 1e-9))))
    if not lines:
        return _figure("Training", "", [])
    y = np.concatenate([line[2] for line in lines])
    x_range = (0.0, float(max(line[1].max() for line in lines)))
    y_range = (float(np.floor(y.min())), float(np.ceil(y.max() + 1e-9)))
    return _chart("Training", lines, "step", "log10 of the loss", x_range, y_range)


def _read_scalars(folder: epath.Path, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one curve; of what was computed twice, the later. Empty if unreadable."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    try:
        events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
        events.Reload()
        if tag in events.Tags()["tensors"]:
            found = [
                (e.step, float(tensor_util.make_ndarray(e.tensor_proto)))
                for e in events.Tensors(tag)
            ]
        else:
            found = [(e.step, e.value) for e in events.Scalars(tag)]
    except Exception as error:  # whatever a half-written file may cause
        logging.warning("%s: no training curves (%s)", folder, error)
        found = []
    latest = dict(found)
    steps = np.array(sorted(latest), float)
    return steps, np.array([latest[step] for step in steps], float)


def _axes(x_name: str, y_name: str, x_range, y_range) -> str:
    parts = [f'<path class="axis" d="M{_LEFT} 0V{_HEIGHT}H{_LEFT + _WIDTH}"/>']
    for share in (0, 0.5, 1):
        x = x_range[0] + share * (x_range[1] - x_range[0])
        y = y_range[0] + share * (y_range[1] - y_range[0])
        anchor = {0: "start", 0.5: "middle", 1: "end"}[share]
        parts.append(
            f'<text x="{_LEFT + share * _WIDTH:.0f}" y="{_HEIGHT + 12}" '
            f'text-anchor="{anchor}">{x:.4g}</text>'
            f'<text x="{_LEFT - 4}" y="{_HEIGHT * (1 - share) + (9 if share == 1 else 3):.0f}" '
            f'text-anchor="end">{y:.3g}</text>'
        )
    middle = _LEFT + _WIDTH / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT + 24}" text-anchor="middle">{x_name}</text>')
    parts.append(f'<text x="{_LEFT}" y="-5">{y_name}</text>')
    return "".join(parts)


def _figure(title: str, body: str, names: list[str]) -> str:
    key = "".join(f'<span class="key k{c}">{name}</span>' for c, name in zip("ab", names))
    if not body:
        return f"<figure><h3>{title}</h3><p class=quiet>not available</p></figure>"
    return (
        f"<figure><h3>{title}</h3>"
        f'<svg viewBox="0 -16 {_LEFT + _WIDTH + 8} {_HEIGHT + _BOTTOM + 20}" role="img" '
        f'aria-label="{title}">{body}</svg><figcaption>{key}</figcaption></figure>'
    )
