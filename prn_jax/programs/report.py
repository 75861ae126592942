"""Writes one page that shows a training's or a study's results: tables, curves, every test image.

    prn-jax report --workdir=runs/mvtec

The page needs no network and no other file.
"""

import os
import sys

from absl import flags

from prn_jax import program

WORKDIR = flags.DEFINE_string("workdir", None, "The training's or the study's.")
OUTPUT = flags.DEFINE_string("output", "", "Default: <workdir>/report.html.")
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    """Writes the report."""
    from etils import epath

    from prn_jax import report
    from prn_jax.errors import UserError, shown

    path = epath.Path(os.path.expanduser(OUTPUT.value or f"{WORKDIR.value}/report.html"))
    if path.is_dir():
        raise UserError(f"--output={shown(path)} is a folder: give the name of a file")
    report.write_report(WORKDIR.value, path, progress=sys.stderr.isatty())
    print(path, flush=True)


def run() -> None:
    """Parses the command line and runs."""
    program.run(main)
