"""Measures speed and memory: of training, inference, the input pipeline, or k-means.

    prn-jax benchmark --what=train --batch_sizes=16,64 --dtypes=float32,bfloat16
    prn-jax benchmark --what=input --config=mvtec --config.category=bottle

All but `input` run on random weights and images: no data set, no hub, no TensorFlow.
"""

import json
import pathlib

from absl import flags

from prn_jax import program

CONFIG = program.define_config("default")
WHAT = flags.DEFINE_enum("what", "train", ["train", "infer", "input", "kmeans"], "What to measure.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", [], "Of train and infer; default: config.batch_size")
DTYPES = flags.DEFINE_list("dtypes", [], "float32, bfloat16; default: config.dtype")
NUM_NORMAL = flags.DEFINE_integer(
    "num_normal", 209, "Normal images (default: bottle's), for the number of prototypes.", 1
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object per measurement, no table.")
PROFILE = flags.DEFINE_string("profile", "", "Folder for a trace of three steps (train, infer).")


def main() -> None:
    """Measures one thing for each batch size and dtype."""
    import jax.numpy as jnp

    from prn_jax import benchmark, experiment, mesh
    from prn_jax.fields import checked
    from prn_jax.models.prn import compute_dtype

    config = checked(CONFIG.value)
    about = {"what": WHAT.value, **benchmark.describe_device()}
    if not JSON.value:
        print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    if WHAT.value == "input":
        config.category = experiment.categories(config)[0]
        measured = benchmark.measure_input(config)
        _print(about | {"category": config.category, "batch_size": config.batch_size} | measured)
        return
    devices = mesh.create_mesh()
    if WHAT.value == "kmeans":
        _print(about | benchmark.measure_k_means(config, devices, NUM_NORMAL.value))
        return
    measure = benchmark.measure_train if WHAT.value == "train" else benchmark.measure_infer
    for dtype in DTYPES.value or [config.dtype]:
        config.dtype = dtype
        config = checked(config)
        dtype = jnp.dtype(compute_dtype(config)).name
        peak = benchmark.matmul_peak(dtype)
        for batch_size in BATCH_SIZES.value or [config.batch_size]:
            config.batch_size = _positive(batch_size)
            mesh.check_batch_size("batch_sizes", config.batch_size, devices)
            trace = ""
            if PROFILE.value:
                trace = str(pathlib.Path(PROFILE.value) / f"{WHAT.value}_{dtype}_{batch_size}")
            with benchmark.without_compilation_cache():
                figures = measure(config, devices, NUM_NORMAL.value, trace)
            share = figures["tflops"] * 1e12 / (peak * devices.size)
            _print(
                about
                | {"dtype": dtype, "batch_size": config.batch_size}
                | {"image_size": list(config.image_size)}
                | figures
                | {"matmul_peak_tflops": peak / 1e12, "share_of_peak": share}
            )


def _positive(text: str) -> int:
    from prn_jax.errors import UserError

    if not str(text).isdecimal() or int(text) < 1:
        raise UserError(f"--batch_sizes: {text!r} is not a number greater than 0")
    return int(text)


def _print(figures: dict) -> None:
    if JSON.value:
        print(json.dumps(figures), flush=True)
        return
    about = ("what", "device", "backend", "devices", "jax", "jaxlib", "flax", "python")
    for name, value in figures.items():
        if name not in about:
            print(f"  {name:22} {_shown(value)}", flush=True)
    print(flush=True)


def _shown(value) -> str:
    if isinstance(value, list):
        return " .. ".join(_shown(x) for x in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run() -> None:
    """Parses the command line and runs."""
    program.run(main)
