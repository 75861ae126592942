"""The same as `prn-jax benchmark`, from a source tree; see prn_jax/programs/benchmark.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax.programs import benchmark  # noqa: E402

if __name__ == "__main__":
    benchmark.run()
