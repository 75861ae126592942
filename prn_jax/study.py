"""A study: variations x categories x seeds, each an independent run."""

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.util
import itertools
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from prn_jax import experiment, pretrained, results
from prn_jax.checkpoints import holds_checkpoints
from prn_jax.errors import Interrupted, UserError, field_line
from prn_jax.fields import checked
from prn_jax.identity import lock
from prn_jax.progress import duration

# Where the runs import this package from, be it installed or not.
_ROOT = str(pathlib.Path(__file__).resolve().parent.parent)
_QUOTES = ("'", '"')
_OWN_FLAGS = {"seed": "--seeds", "category": "--categories"}
_LONGEST_NAME = 100  # bytes of a variation in a folder's name


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One category with one seed.

    Attributes:
      category: its name.
      seed: of training; the split of the seen anomalies has `config.split_seed + seed`.
      config: the whole configuration of the run.
      workdir: `<study>/seed_<seed>`, or `<study>/<variation>,seed_<seed>`.
      command: what trains it, as arguments.
      variation: name of what is varied; "" where nothing is.
      allow_config_change: go on from what is there although it is made of something else.
    """

    category: str
    seed: int
    config: ConfigDict
    workdir: epath.Path
    command: list[str]
    variation: str = ""
    allow_config_change: bool = False

    @property
    def name(self) -> str:
        """As messages call it."""
        return ", ".join(filter(None, (self.variation, f"seed {self.seed}", self.category)))

    @property
    def folder(self) -> epath.Path:
        """Where its results go."""
        return self.workdir / self.category

    def is_finished(self) -> bool:
        """Whether its results are there; refuses a run that is made of something else."""
        allow = self.allow_config_change
        return experiment.finished(self.config, self.folder, allow) is not None


def plan(
    config: ConfigDict,
    categories: Sequence[str],
    seeds: Sequence[int],
    workdir: epath.PathLike,
    overrides: Sequence[str],
    variations: dict[str, dict[str, str]] | None = None,
    allow_config_change: bool = False,
) -> list[StudyRun]:
    """The runs of a study, variation after variation and in it seed after seed.

    Args:
      config: as the command line gives it; its seed is replaced, its split seed counted up.
      categories: their names.
      seeds: of training.
      workdir: of the study.
      overrides: the `--config...` arguments that made `config`, for the runs' command lines.
      variations: from `vary` or `configs/ablations.py`: by name, fields and their values.
      allow_config_change: go on from what is there although it is made of something else.
    """
    root = epath.Path(os.path.expanduser(workdir))
    if "://" not in os.fspath(workdir):
        root = root.resolve()
    runs = []
    for variation, varied in (variations or {"": {}}).items():
        changed = varied_config(config, varied)
        for seed, category in itertools.product(seeds, categories):
            own = changed.copy_and_resolve_references()
            own.seed, own.split_seed, own.category = seed, changed.split_seed + seed, category
            own = checked(own)
            folder = root / f"{folder_name(variation)}seed_{seed}"
            fields = varied | {"seed": seed, "split_seed": own.split_seed, "category": category}
            command = [sys.executable, "-m", "prn_jax", "train", *overrides, f"--workdir={folder}"]
            command += [f"--config.{name}={value}" for name, value in fields.items()]
            command += ["--allow_config_change"] * allow_config_change
            run = StudyRun(category, seed, own, folder, command, variation, allow_config_change)
            runs.append(run)
    return runs


def vary(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """The grid of `field=value,value` texts: by name, fields and values as a command line has them.

    Commas inside of brackets belong to a value, and so do those of a value in quotes, which are
    taken off: "" is an empty text.

    Raises:
      UserError: a text is no such thing, a field comes twice, or is not to be varied so.
    """
    axes = {}
    for text in texts:
        field, equals, values = text.partition("=")
        field = field.strip().removeprefix("--").removeprefix("config.")
        values = [x.strip() for x in _split(values)]
        unclosed = any(x[:1] in _QUOTES and (len(x) == 1 or x[-1] != x[0]) for x in values if x)
        if not equals or not field or "" in values or field in axes or unclosed:
            raise UserError(
                f"--vary={text}: give a field once and its values, as in "
                "--vary='config.attention.layers=0,3'"
            )
        if field in _OWN_FLAGS:
            raise UserError(f"--vary={text}: give {_OWN_FLAGS[field]} instead")
        values = [x[1:-1] if x[0] in _QUOTES else x for x in values]
        axes[field] = list(dict.fromkeys(values))
    grid = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    return {" ".join(f"{k}={v}" for k, v in fields.items()): fields for fields in grid}


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES and not parts[-1].strip():  # else it is an apostrophe
            quote = letter
        depth += 0 if quote else (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def varied_config(config: ConfigDict, fields: dict[str, str]) -> ConfigDict:
    """The checked configuration with fields set as a command line sets them.

    Raises:
      UserError: there is no such field, or it does not take the value.
    """
    arguments = ["study", *(f"--config.{name}={value}" for name, value in fields.items())]
    own = flags.FlagValues()
    try:
        holder = config_flags.DEFINE_config_dict(
            "config", config.copy_and_resolve_references(), flag_values=own, sys_argv=arguments
        )
        own(arguments)
    except (AttributeError, flags.Error, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--vary {' '.join(arguments[1:])}: {field_line(error)}") from error
    return checked(holder.value)


def folder_name(variation: str) -> str:
    """What a variation's folders begin with; different for different ones."""
    if not variation:
        return ""
    name = re.sub(r"[^\w.=-]+", "_", variation)
    if name != variation or len(name.encode()) > _LONGEST_NAME:
        name = name.encode()[:_LONGEST_NAME].decode(errors="ignore")
        name = f"{name}-{hashlib.sha256(variation.encode()).hexdigest()[:6]}"
    return f"{name},"


# --- running --------------------------------------------------------------------------------------


def execute(runs: Sequence[StudyRun], workdir: pathlib.Path, parallel: int) -> list[StudyRun]:
    """Runs what is unfinished, several at a time; returns what failed.

    Each run is a process of its own with its share of the machine's accelerators, and writes its
    log to `<workdir>/[<variation>,]seed_<seed>/<category>.log`. A run that fails does not stop the
    others.

    Args:
      runs: from `plan`.
      workdir: of the study, local; one study at a time works in it.
      parallel: processes at a time.

    Raises:
      UserError: another study runs in `workdir`, the backbone's weights cannot be had, or a run
        that was interrupted is made of something else.
      Interrupted: after SIGTERM or Ctrl-C, when the running ones have saved.
    """
    # Refuses what is made of something else before anything runs.
    waiting = [run for run in runs if not run.is_finished()]
    done = len(runs) - len(waiting)
    if done:
        logging.info("%d of %d runs are finished already", done, len(runs))
    # Once, before any run prepares its data and finds them missing; a checkpoint has them in it.
    new = [run.config for run in waiting if not holds_checkpoints(run.folder / "checkpoints")]
    for config in {pretrained.sources(config): config for config in new}.values():
        pretrained.check(config)
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
                if process.returncode == 0 and has_finished(run):
                    finished_now += 1
                    left = len(waiting) + len(active)
                    ahead = (time.monotonic() - began) / finished_now * left
                    metrics = results.read_run(run.folder)["metrics"]
                    logging.info(
                        "%s: done in %s, image AUROC %s, pixel AUROC %s; %d of %d, ETA %s",
                        run.name,
                        duration(seconds),
                        results.percent(metrics["image_auroc"]),
                        results.percent(metrics["pixel_auroc"]),
                        len(runs) - left - len(failed),
                        len(runs),
                        duration(ahead),
                    )
                else:
                    failed.append(run)
                    asked = (signal.SIGTERM, signal.SIGINT)
                    stopped = process.returncode in [128 + number for number in asked]
                    how = (
                        "stopped and saved, goes on with the same command" if stopped else "failed"
                    )
                    logging.error("%s: %s; %s", run.name, how, _last_line(run))
    return failed


def has_finished(run: StudyRun) -> bool:
    """Whether it has; one that made something else has failed, and the others go on."""
    try:
        return run.is_finished()
    except UserError as error:
        logging.error("%s: %s", run.name, error)
        return False


def _start(run: StudyRun, slot: int, parallel: int) -> subprocess.Popen:
    log = pathlib.Path(run.workdir) / f"{run.category}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    path = filter(None, (_ROOT, os.environ.get("PYTHONPATH")))
    with log.open("a") as output:
        return subprocess.Popen(
            run.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ
            | _devices(slot, parallel, run.config.batch_size)
            | {"PYTHONPATH": os.pathsep.join(path)},
            preexec_fn=_die_with_parent,
            close_fds=False,  # the lock stays held while a run is still saving
        )


def _die_with_parent() -> None:
    """Whatever ends the study, its runs save and stop (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _devices(slot: int, parallel: int, batch_size: int) -> dict[str, str]:
    """The environment that gives each of several processes its own accelerators."""
    if parallel == 1:
        return {}
    chips = sorted(pathlib.Path("/dev").glob("accel[0-9]*"))
    if not chips and importlib.util.find_spec("libtpu"):  # since TPU v5e
        chips = sorted(pathlib.Path("/dev/vfio").glob("[0-9]*"))
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
    share = gpus[slot::parallel] or [gpus[slot % len(gpus)]]
    while batch_size % len(share):  # each takes an equal part of a batch
        share.pop()
    # More processes than GPUs share them: none may then take all of the memory.
    fraction = 0.9 / math.ceil(parallel / len(gpus))
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
        raise Interrupted("stopped and saved; the same command goes on", number)

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


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """The `--config` arguments of a command line, to pass on to the runs."""

    def is_ours(name: str) -> bool:
        return name == "config" or name.startswith("config.")

    kept, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name = argument.lstrip("-").split("=")[0]
        if name == "vary" and "=" not in argument:
            del rest[:1]  # its value may begin with --config., see `vary`
        # --noconfig.FIELD is absl's way to say that a field is false.
        if not argument.startswith("-") or not (is_ours(name) or is_ours(name.removeprefix("no"))):
            continue
        kept.append(argument)
        if "=" not in argument and rest and not rest[0].startswith("--"):
            kept.append(rest.pop(0))
    return kept
