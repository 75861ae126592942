"""The same as `prn-jax evaluate`, from a source tree; see prn_jax/programs/evaluate.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax.programs import evaluate  # noqa: E402

if __name__ == "__main__":
    evaluate.run()
