"""The same as `prn-jax report`, from a source tree; see prn_jax/programs/report.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax.programs import report  # noqa: E402

if __name__ == "__main__":
    report.run()
