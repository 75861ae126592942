"""A study's tables: means and standard deviations, beside the paper's figures."""

import csv
import io
import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from prn_jax import disk, results
from prn_jax.study import StudyRun, has_finished
from prn_jax.tiles import Tiling

# As a public README quotes them from the paper; its PRO and AP per category are recalled from other
# papers' tables.
_QUOTED = ("image_auroc", "pixel_auroc")
_LEGEND = (
    "The paper's figures in the last row are the mean over the categories above, and of all 15 the "
    "means that it states. † second-hand and unconfirmed; so is carpet's image AUROC."
)
_LATEX = {letter: f"\\{letter}" for letter in "_%&#${}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "†": r"$^\dagger$",
    "±": r"$\pm$",
}

Figure = tuple[float, float | None]
Row = tuple[str, int, dict[str, Figure | None]]
# By category, then by seed, the metrics of a run.
Found = dict[str, dict[int, dict[str, float | None]]]


def read(runs: Sequence[StudyRun]) -> Found:
    """The metrics of the finished runs; a category without any is there too."""
    found: Found = {}
    for run in runs:
        by_seed = found.setdefault(run.category, {})
        if has_finished(run):
            by_seed[run.seed] = results.read_run(run.folder)["metrics"]
    return found


def summarise(found: Found) -> list[Row]:
    """Mean and standard deviation of the finished runs.

    Returns:
      Per category its name, the number of seeds, and by column the mean with the sample's standard
      deviation (None with one seed; no figure where a run has none); last the mean over the
      categories: its deviation is that between seeds, over those seeds that finished every
      category.
    """
    rows = []
    for name, by_seed in found.items():
        figures = {c: _spread([m[c] for m in by_seed.values()]) for c in results.COLUMNS}
        rows.append((name, len(by_seed), figures))
    return [*rows, ("mean", *_overall(found, _complete(found)))]


def compare(variations: dict[str, Found]) -> tuple[list[Row], list[int]]:
    """A row per variation: the mean over the categories, with the deviation between seeds.

    Returns:
      The rows, and the seeds that they are of: those that finished every category of every
      variation, so that rows differ by nothing else.
    """
    seeds = sorted(set.intersection(*(set(_complete(found)) for found in variations.values())))
    return [(name, *_overall(found, seeds)) for name, found in variations.items()], seeds


def _complete(found: Found) -> list[int]:
    return sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))


def _overall(found: Found, seeds: Sequence[int]) -> tuple[int, dict[str, Figure | None]]:
    """Over the same categories in every column: none where one of them has no figure."""
    figures = {}
    for column in results.COLUMNS:
        table = [[by_seed[seed][column] for by_seed in found.values()] for seed in seeds]
        whole = not any(None in values for values in table)
        figures[column] = _spread([float(np.mean(values)) for values in table]) if whole else None
    return len(seeds), figures


def _spread(values: Sequence[float | None]) -> Figure | None:
    if not values or None in values:
        return None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), deviation


def write_study(runs: Sequence[StudyRun], workdir: epath.PathLike, dataset: str) -> None:
    """Writes `study.{md,csv,tex}`.

    Of variations `study.md` has a row for each, then the table of each; `study.csv` has the tables,
    `study.tex` the rows.
    """
    folder = epath.Path(os.path.expanduser(workdir))
    names = dict.fromkeys(run.variation for run in runs)
    variations = {name: read([run for run in runs if run.variation == name]) for name in names}
    of = {run.variation: _network_and_length(run.config) for run in runs}
    if list(variations) == [""]:
        write_tables(summarise(variations[""]), folder, dataset, of[""])
        return
    rows, seeds = compare(variations)
    categories = ", ".join(dict.fromkeys(run.category for run in runs))
    of_seeds = f"seeds {', '.join(map(str, seeds))}" if seeds else "no seed yet"
    texts = [
        "# Variations",
        "",
        f"Mean over {categories}, ± standard deviation between seeds, percent; {of_seeds}: those "
        "that every variation has finished.",
        "",
        *results.markdown(["variation", *_titles("")], _cells(rows, "", " ± ")),
        "",
    ]
    tables = []
    for name, found in variations.items():
        own = summarise(found)
        texts += [f"## {name}", "", _body(own, dataset, of[name])]
        tables += [[name, *line] for line in _lines(own, dataset)]
    disk.write_file(folder / "study.md", "\n".join(texts))
    disk.write_file(folder / "study.csv", _csv([["variation", *_heads(dataset)], *tables]))
    disk.write_file(folder / "study.tex", _latex(rows, "", "variation"))


def write_tables(rows: Sequence[Row], workdir: epath.PathLike, dataset: str, of: str) -> None:
    """Writes `study.md`, `study.csv` and `study.tex` (booktabs); `of` says of which network."""
    folder = epath.Path(os.path.expanduser(workdir))
    disk.write_file(folder / "study.md", f"# PRN on {dataset}\n\n{_body(rows, dataset, of)}")
    disk.write_file(folder / "study.csv", _csv([_heads(dataset), *_lines(rows, dataset)]))
    disk.write_file(folder / "study.tex", _latex(rows, dataset))


def _columns(dataset: str) -> list[tuple[str, str, bool]]:
    """(key, title, whether it is the paper's): ours, each followed by the paper's if it has any."""
    columns = []
    for key, title in results.COLUMNS.items():
        columns.append((key, title, False))
        if dataset in results.PAPER and key in results.PAPER_MEAN[dataset]:
            columns.append((key, "paper" if key in _QUOTED else "paper†", True))
    return columns


def _titles(dataset: str) -> list[str]:
    """Of the columns of a table, after the first."""
    return ["seeds", *(title for _, title, _ in _columns(dataset))]


def _paper(row: Row, rows: Sequence[Row], dataset: str, key: str) -> float | None:
    """The paper's figure; in the last row the mean over the study's categories."""
    names = [name for name, *_ in rows[:-1]] if row is rows[-1] else [row[0]]
    figures = results.paper_mean(names, dataset)
    return figures and figures[key]


def _cells(rows: Sequence[Row], dataset: str, between: str) -> list[list[str]]:
    table = []
    for row in rows:
        cells = [row[0], str(row[1])]
        for key, _, is_paper in _columns(dataset):
            if is_paper:
                cells.append(results.percent(_paper(row, rows, dataset, key)))
            elif (figure := row[2][key]) is None:
                cells.append("-")
            else:
                mean, deviation = figure
                spread = "" if deviation is None else f"{between}{100 * deviation:.1f}"
                cells.append(results.percent(mean) + spread)
        table.append(cells)
    return table


def _network_and_length(config: ConfigDict) -> str:
    steps, epochs = config.total_steps, config.epochs
    length = f"{epochs} epochs" if steps < 0 else f"{steps} steps" if steps else "not trained"
    size = f"batches of {config.batch_size}, {Tiling.of(config)}"
    return f"{results.network(config)}; {length}, {size}"


def _body(rows: Sequence[Row], dataset: str, of: str) -> str:
    """The table in Markdown, with what it shows."""
    lines = [
        f"{of}. Percent, mean ± standard deviation over seeds of training and split, last "
        "checkpoint, seen anomalies removed from the test split.",
        "",
        *results.markdown(["category", *_titles(dataset)], _cells(rows, dataset, " ± ")),
        "",
    ]
    if dataset in results.PAPER:
        lines += [_LEGEND, ""]
    return "\n".join(lines)


def _heads(dataset: str) -> list[str]:
    """Of the columns of the CSV file."""
    heads = ["category", "seeds"]
    for key, _, is_paper in _columns(dataset):
        heads += [f"{key}_paper"] if is_paper else [f"{key}_mean", f"{key}_std"]
    return heads


def _lines(rows: Sequence[Row], dataset: str) -> list[list[str]]:
    """Of the CSV file, shares instead of percent."""
    lines = []
    for row in rows:
        cells = [row[0], str(row[1])]
        for key, _, is_paper in _columns(dataset):
            if is_paper:
                value = _paper(row, rows, dataset, key)
                cells.append("" if value is None else f"{value:.6f}")
            else:
                mean, deviation = row[2][key] or (None, None)
                cells += ["" if x is None else f"{x:.6f}" for x in (mean, deviation)]
        lines.append(cells)
    return lines


def _csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _latex(rows: Sequence[Row], dataset: str, first: str = "category") -> str:
    def safe(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in text)

    titles = [first, *_titles(dataset)]
    body = [[safe(x) for x in cells] for cells in _cells(rows, dataset, " ± ")]
    body = [" & ".join(cells) + r" \\" for cells in body]
    if first == "category":  # the last row is their mean
        body.insert(-1, r"\midrule")
    lines = [
        r"\begin{tabular}{l" + "r" * (len(titles) - 1) + "}",
        r"\toprule",
        " & ".join(map(safe, titles)) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *([f"% {_LEGEND}"] if dataset in results.PAPER else []),
        "",
    ]
    return "\n".join(lines)
