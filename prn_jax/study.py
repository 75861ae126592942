"""A study: categories x seeds, each an independent run, and the table of means and deviations."""

import contextlib
import csv
import ctypes
import dataclasses
import io
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from prn_jax import experiment, results
from prn_jax.errors import Interrupted, UserError
from prn_jax.identity import lock

_MAIN = pathlib.Path(__file__).resolve().parent.parent / "launch" / "main.py"
# The paper states these two; its PRO and AP per category are second-hand.
_CONFIRMED = ("image_auroc", "pixel_auroc")


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One category with one seed.

    Attributes:
      category: its name.
      seed: of training; the split of the seen anomalies has `config.split_seed + seed`.
      config: the whole configuration of the run.
      workdir: `<study>/seed_<seed>`.
      command: what trains it, as arguments.
    """

    category: str
    seed: int
    config: ConfigDict
    workdir: epath.Path
    command: list[str]

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"seed {self.seed}, {self.category}"

    @property
    def folder(self) -> epath.Path:
        """Where its results go."""
        return self.workdir / self.category

    def is_finished(self) -> bool:
        """Whether its results are there; refuses those that are made of something else."""
        return experiment.finished(self.config, self.folder) is not None


def plan(
    config: ConfigDict,
    categories: Sequence[str],
    seeds: Sequence[int],
    workdir: epath.PathLike,
    overrides: Sequence[str],
) -> list[StudyRun]:
    """The runs of a study, seed after seed.

    Args:
      config: the checked configuration; its seed is replaced, its split seed counted up.
      categories: their names.
      seeds: of training.
      workdir: of the study.
      overrides: the `--config...` arguments that made `config`, for the runs' command lines.
    """
    root = epath.Path(workdir).expanduser()
    if "://" not in os.fspath(workdir):
        root = root.resolve()
    runs = []
    for seed in seeds:
        for category in categories:
            own = config.copy_and_resolve_references()
            own.seed, own.split_seed, own.category = seed, config.split_seed + seed, category
            folder = root / f"seed_{seed}"
            fields = {"seed": seed, "split_seed": own.split_seed, "category": category}
            command = [sys.executable, str(_MAIN), *overrides, f"--workdir={folder}"]
            command += [f"--config.{name}={value}" for name, value in fields.items()]
            runs.append(StudyRun(category, seed, own, folder, command))
    return runs


# --- running --------------------------------------------------------------------------------------


def execute(runs: Sequence[StudyRun], workdir: pathlib.Path, parallel: int) -> list[StudyRun]:
    """Runs what is unfinished, several at a time; returns what failed.

    Each run is a process of its own with its share of the machine's accelerators, and writes its
    log to `<workdir>/seed_<seed>/<category>.log`. A run that fails does not stop the others.

    Args:
      runs: from `plan`.
      workdir: of the study, local; one study at a time works in it.
      parallel: processes at a time.

    Raises:
      UserError: another study runs in `workdir`.
      Interrupted: after SIGTERM or Ctrl-C, when the running ones have saved.
    """
    waiting = [run for run in runs if not run.is_finished()]
    done = len(runs) - len(waiting)
    if done:
        logging.info("%d of %d runs are finished already", done, len(runs))
    failed: list[StudyRun] = []
    active: dict[int, tuple[subprocess.Popen, StudyRun, float]] = {}
    began, finished_now = time.monotonic(), 0
    # Held also by the runs, which may outlive a study that is killed.
    with lock(workdir, "study", inheritable=True), _forwarded(active):
        while waiting or active:
            for slot in range(parallel):
                if slot not in active and waiting:
                    run = waiting.pop(0)
                    logging.info("%s: started", run.name)
                    active[slot] = _start(run, slot, parallel), run, time.monotonic()
            time.sleep(0.2)
            for slot, (process, run, start) in list(active.items()):
                if process.poll() is None:
                    continue
                del active[slot]
                seconds = time.monotonic() - start
                if process.returncode == 0 and run.is_finished():
                    finished_now += 1
                    left = len(waiting) + len(active)
                    ahead = (time.monotonic() - began) / finished_now * left
                    metrics = results.read_run(run.folder)["metrics"]
                    logging.info(
                        "%s: done in %s, image AUROC %s, pixel AUROC %s; %d of %d, ETA %s",
                        run.name,
                        _duration(seconds),
                        results.percent(metrics["image_auroc"]),
                        results.percent(metrics["pixel_auroc"]),
                        len(runs) - left - len(failed),
                        len(runs),
                        _duration(ahead),
                    )
                else:
                    failed.append(run)
                    logging.error("%s: failed; %s", run.name, _last_line(run))
    return failed


def _start(run: StudyRun, slot: int, parallel: int) -> subprocess.Popen:
    log = pathlib.Path(run.workdir) / f"{run.category}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        return subprocess.Popen(
            run.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | _devices(slot, parallel),
            preexec_fn=_die_with_parent,
            close_fds=False,  # the lock stays held while a run is still saving
        )


def _die_with_parent() -> None:
    """Whatever ends the study, its runs save and stop (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _devices(slot: int, parallel: int) -> dict[str, str]:
    """The environment that gives each of several processes its own accelerators."""
    if parallel == 1:
        return {}
    chips = sorted(pathlib.Path("/dev").glob("accel[0-9]*"))
    if chips:
        share = [str(i) for i in range(len(chips))][slot::parallel]
        if len(share) != 1:
            raise UserError(f"--parallel={parallel}: on this TPU host give 1 or {len(chips)}")
        return {
            "TPU_VISIBLE_CHIPS": share[0],
            "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
            "TPU_PROCESS_BOUNDS": "1,1,1",
        }
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = [x for x in visible.split(",") if x]
    else:
        count = len(list(pathlib.Path("/proc/driver/nvidia/gpus").glob("*")))
        gpus = [str(i) for i in range(count)]
    if not gpus:
        return {}
    # More processes than GPUs share them: none may then take all of the memory.
    share = gpus[slot::parallel] or [gpus[slot % len(gpus)]]
    fraction = min(1.0, len(gpus) / parallel) * 0.9
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(share),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.2f}",
    }


@contextlib.contextmanager
def _forwarded(active: dict):
    """SIGTERM and Ctrl-C reach the runs, which save; then the study ends."""

    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for process, *_ in active.values():
            process.terminate()
        for process, *_ in active.values():
            process.wait()
        raise Interrupted("stopped and saved; the same command goes on")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(run: StudyRun) -> str:
    path = pathlib.Path(run.workdir) / f"{run.category}.log"
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it printed nothing'} (see {path})"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def slurm_array(runs: Sequence[StudyRun], at_once: int) -> str:
    """A batch script that runs a study's runs as a job array, one GPU each."""
    commands = "\n".join(
        f"  {shlex.quote(shlex.join(['python', *run.command[1:]]))}" for run in runs
    )
    return f"""#!/usr/bin/env bash
#SBATCH --job-name=prn-study
#SBATCH --array=0-{len(runs) - 1}%{at_once}
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=prn-study-%A-%a.log
# When all are done, the command that printed this, without --slurm, writes the table.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate
runs=(
{commands}
)
eval "exec ${{runs[$SLURM_ARRAY_TASK_ID]}}"
"""


# --- the table ------------------------------------------------------------------------------------


Figure = tuple[float, float | None]
Row = tuple[str, int, dict[str, Figure | None]]


def summarise(runs: Sequence[StudyRun]) -> list[Row]:
    """Mean and standard deviation of the finished runs.

    Returns:
      Per category its name, the number of seeds, and by column the mean with the sample's standard
      deviation (None with one seed); last the mean over the categories: its deviation is that
      between seeds, over those seeds that finished every category.
    """
    found: dict[str, dict[int, dict]] = {}
    for run in runs:
        by_seed = found.setdefault(run.category, {})
        if run.is_finished():
            by_seed[run.seed] = results.read_run(run.folder)["metrics"]
    rows = []
    for name, by_seed in found.items():
        figures = {c: _spread([m[c] for m in by_seed.values()]) for c in results.COLUMNS}
        rows.append((name, len(by_seed), figures))
    complete = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
    means = [results.mean([found[name][seed] for name in found]) for seed in complete]
    overall = {c: _spread([m[c] for m in means]) for c in results.COLUMNS}
    return [*rows, ("mean", len(complete), overall)]


def _spread(values: Sequence[float | None]) -> Figure | None:
    if not values or None in values:
        return None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), deviation


def write_tables(rows: Sequence[Row], workdir: epath.PathLike, dataset: str) -> None:
    """Writes `study.md`, `study.csv` and `study.tex` (booktabs)."""
    folder = epath.Path(workdir).expanduser()
    results.write_file(folder / "study.md", _markdown(rows, dataset))
    results.write_file(folder / "study.csv", _csv(rows, dataset))
    results.write_file(folder / "study.tex", _latex(rows, dataset))


def _columns(dataset: str) -> list[tuple[str, str, bool]]:
    """(key, title, whether it is the paper's): ours, each followed by the paper's if it has any."""
    columns = []
    for key, title in results.COLUMNS.items():
        columns.append((key, title, False))
        if dataset in results.PAPER and key in results.PAPER_MEAN[dataset]:
            columns.append((key, "paper" if key in _CONFIRMED else "paper†", True))
    return columns


def _paper(row: Row, rows: Sequence[Row], dataset: str, key: str) -> float | None:
    """The paper's figure; in the last row the mean over the study's categories."""
    figures = results.PAPER[dataset]
    names = [name for name, *_ in rows[:-1]] if row is rows[-1] else [row[0]]
    if any(name not in figures for name in names):
        return None
    return float(np.mean([figures[name][key] for name in names]))


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


def _markdown(rows: Sequence[Row], dataset: str) -> str:
    titles = ["category", "seeds", *(title for _, title, _ in _columns(dataset))]
    lines = [
        f"# PRN on {dataset}",
        "",
        "Percent, mean ± standard deviation over seeds of training and split, last checkpoint, "
        "seen anomalies removed from the test split.",
        "",
        "| " + " | ".join(titles) + " |",
        "| --- |" + " ---: |" * (len(titles) - 1),
        *("| " + " | ".join(cells) + " |" for cells in _cells(rows, dataset, " ± ")),
        "",
    ]
    if dataset in results.PAPER:
        lines += [
            "The paper's figures in the last row are the mean over the categories above. "
            "† second-hand and unconfirmed; so is carpet's image AUROC.",
            "",
        ]
    return "\n".join(lines)


def _csv(rows: Sequence[Row], dataset: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = []
    for key, _, is_paper in _columns(dataset):
        heads += [f"{key}_paper"] if is_paper else [f"{key}_mean", f"{key}_std"]
    writer.writerow(["category", "seeds", *heads])
    for row in rows:
        cells = [row[0], row[1]]
        for key, _, is_paper in _columns(dataset):
            if is_paper:
                value = _paper(row, rows, dataset, key)
                cells.append("" if value is None else f"{value:.6f}")
            else:
                mean, deviation = row[2][key] or (None, None)
                cells += ["" if x is None else f"{x:.6f}" for x in (mean, deviation)]
        writer.writerow(cells)
    return text.getvalue()


def _latex(rows: Sequence[Row], dataset: str) -> str:
    def safe(text: str) -> str:
        text = re.sub(r"([_%&#])", r"\\\1", text)
        return text.replace("†", r"$^\dagger$").replace("±", r"$\pm$")

    columns = _columns(dataset)
    titles = ["category", "seeds", *(title for _, title, _ in columns)]
    body = [[safe(x) for x in cells] for cells in _cells(rows, dataset, " ± ")]
    body = [" & ".join(cells) for cells in body]
    lines = [
        r"\begin{tabular}{l" + "r" * (len(titles) - 1) + "}",
        r"\toprule",
        " & ".join(map(safe, titles)) + r" \\",
        r"\midrule",
        *(line + r" \\" for line in body[:-1]),
        r"\midrule",
        body[-1] + r" \\",
        r"\bottomrule",
        r"\end{tabular}",
        "",
    ]
    return "\n".join(lines)


def overrides_of(arguments: Sequence[str], is_ours: Callable[[str], bool]) -> list[str]:
    """The `--config` arguments of a command line, to pass on to the runs."""
    kept, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or not is_ours(argument.lstrip("-").split("=")[0]):
            continue
        kept.append(argument)
        if "=" not in argument and rest and not rest[0].startswith("--"):
            kept.append(rest.pop(0))
    return kept
