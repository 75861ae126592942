"""The same as `prn-jax watch`, from a source tree; see prn_jax/programs/watch.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prn_jax.programs import watch  # noqa: E402

if __name__ == "__main__":
    watch.run()
