"""The same as `prn-jax predict`, from a source tree; see prn_jax/programs/predict.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax.programs import predict  # noqa: E402

if __name__ == "__main__":
    predict.run()
