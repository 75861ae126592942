"""The same as `prn-jax train`, from a source tree; see prn_jax/programs/train.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax.programs import train  # noqa: E402

if __name__ == "__main__":
    train.run()
