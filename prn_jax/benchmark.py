"""Speed and memory of the parts, on whatever devices are there.

Nothing here needs a data set, nor TensorFlow, but for `measure_input`.
"""

import contextlib
import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prn_jax import evaluate, train
from prn_jax import mesh as meshes
from prn_jax.models.prn import PRN, create_model
from prn_jax.models.prototypes import k_means, num_prototypes

Figures = dict[str, Any]

# A measurement is the median of so many spans, each of as many calls as fill `_SPAN` seconds.
_SPANS, _SPAN = 7, 0.5


def measure_train(config: ConfigDict, mesh: Mesh, num_normal: int, trace: str = "") -> Figures:
    """One training step with random weights, images and masks.

    Args:
      config: see configs/default.py; `batch_size` images over all devices.
      mesh: devices.
      num_normal: normal images, of which the number of prototypes follows.
      trace: folder for a profile of three steps; "" for none.

    Returns:
      `compile_s`, `step_ms` (median) with its `spread_ms` (least and most), `images_per_s`,
      `gflop_per_image` (XLA's count of the whole step), `tflops` per second over all devices,
      `memory_gb` (peak of one device; on CPU of the process) and `program_gb` (what XLA plans for
      one device: arguments, outputs, temporaries).
    """
    model, variables = _network(config, num_normal)
    optimizer = train.create_optimizer(config, 1000)
    variables = meshes.replicate(mesh, variables)
    state = train.create_state(config, variables, optimizer, mesh)
    frozen = {name: variables[name] for name in ("backbone", "prototypes")}
    batch = meshes.shard(mesh, _batch(config))
    step = train.make_train_step(config, model, optimizer, mesh)
    compiled, figures = _compile(step, state, frozen, batch)

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, values = compiled(state, frozen, batch)
        jax.block_until_ready(values)

    return _measured(run, figures, config.batch_size, mesh, trace)


def measure_infer(config: ConfigDict, mesh: Mesh, num_normal: int, trace: str = "") -> Figures:
    """Maps and scores of one batch; arguments and figures as of `measure_train`."""
    model, variables = _network(config, num_normal)
    variables = meshes.replicate(mesh, variables)
    image = meshes.shard(mesh, _batch(config))["image"]
    step = evaluate.make_eval_step(model, config.score_pixels, mesh)
    compiled, figures = _compile(step, variables, image)

    def run(count: int) -> None:
        for _ in range(count):
            results = compiled(variables, image)
        jax.block_until_ready(results)

    return _measured(run, figures, config.batch_size, mesh, trace)


def measure_k_means(config: ConfigDict, mesh: Mesh, num_normal: int) -> Figures:
    """Clusters random maps of each scale as large as the network's.

    Returns:
      `points`, `clusters`; per scale `scale_i_dimensions` and `scale_i_s` (median of three, after
      compilation).
    """
    height, width = config.image_size
    model = create_model(config, num_prototypes(num_normal, config.prototypes))
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    prototypes = jax.eval_shape(model.init, jax.random.key(0), image)["prototypes"]
    figures = {"points": num_normal, "clusters": model.num_prototypes}
    for name, variables in sorted(prototypes.items()):
        if "maps" not in variables:
            continue
        dimensions = int(np.prod(variables["maps"].shape[1:]))
        points = jax.random.normal(jax.random.key(0), (num_normal, dimensions))
        cluster = functools.partial(
            k_means,
            points,
            model.num_prototypes,
            jax.random.key(1),
            mesh,
            config.prototypes.iterations,
        )
        jax.block_until_ready(cluster())
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            jax.block_until_ready(cluster())
            seconds.append(time.perf_counter() - began)
        figures |= {
            f"{name}_dimensions": dimensions,
            f"{name}_s": statistics.median(seconds),
        }
    return figures


def measure_input(config: ConfigDict, seconds: float = 10.0) -> Figures:
    """The steady input pipeline of `config.category`, read and synthesised as in training.

    Args:
      config: see configs/default.py.
      seconds: to measure for.

    Returns:
      `load_s` (read, decode, resize), `first_batch_s` (with the tracing of the pipeline),
      `images_per_s`, `images_per_cpu_s` (per second of one core's work) and `memory_gb`.
    """
    from prn_jax import input_pipeline

    began = time.perf_counter()
    data = input_pipeline.load_category(config, config.category)
    loaded = time.perf_counter()
    batches = input_pipeline.train_batches(config, data, total_steps=10**9)
    next(batches)
    first = time.perf_counter()
    # What was made ahead while nobody looked does not count.
    for _ in range(10):
        next(batches)
    start, work = time.perf_counter(), time.process_time()
    count = 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += config.batch_size
    elapsed, work = time.perf_counter() - start, time.process_time() - work
    return {
        "load_s": loaded - began,
        "first_batch_s": first - loaded,
        "images_per_s": count / elapsed,
        "images_per_cpu_s": count / work,
        "memory_gb": _process_gb(),
    }


def matmul_peak(dtype: str) -> float:
    """Operations per second of a large matrix product on one device: the peak one can reach."""
    size = 8192 if jax.default_backend() != "cpu" else 2048
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    # At JAX's default precision, as the network's own products are.
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))

    def run(count: int) -> None:
        for _ in range(count):
            result = product(a, a)
        jax.block_until_ready(result)

    return 2.0 * size**3 / min(_times(run))


def describe_device() -> Figures:
    """The devices and versions that figures belong to."""
    import flax
    import jaxlib

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "backend": device.platform,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "python": sys.version.split()[0],
    }


def _network(config: ConfigDict, num_normal: int) -> tuple[PRN, Any]:
    model = create_model(config, num_prototypes(num_normal, config.prototypes))
    return model, train.initialise(config, model)


def _batch(config: ConfigDict) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(config.seed)
    shape = (config.batch_size // jax.process_count(), *config.image_size)
    return {
        "image": rng.integers(0, 256, (*shape, 3), np.uint8),
        "mask": (rng.random(shape) < 0.02).astype(np.uint8),
    }


def _compile(step: Callable, *arguments) -> tuple[Callable, Figures]:
    """The compiled step, with what XLA knows about it."""
    began = time.perf_counter()
    lowered = step.lower(*arguments)
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    # The count before optimisation: a GPU's library calls would hide theirs.
    flops = lowered.cost_analysis()["flops"]
    memory = compiled.memory_analysis()
    planned = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return compiled, {"compile_s": seconds, "flops": flops, "program_gb": planned / 1e9}


def _measured(
    run: Callable[[int], None], figures: Figures, batch_size: int, mesh: Mesh, trace: str
) -> Figures:
    run(2)  # the first calls allocate
    times = _times(run)
    step = statistics.median(times)
    if trace:
        with jax.profiler.trace(trace):
            run(3)
    # XLA counts one device's share of a mapped program.
    flops = figures.pop("flops") * mesh.size
    return figures | {
        "step_ms": 1e3 * step,
        "spread_ms": [1e3 * min(times), 1e3 * max(times)],
        "images_per_s": batch_size / step,
        "gflop_per_image": flops / batch_size / 1e9,
        "tflops": flops / step / 1e12,
        "memory_gb": _peak_gb(mesh),
    }


def _times(run: Callable[[int], None]) -> list[float]:
    """Seconds per call, of each span."""
    began = time.perf_counter()
    run(1)
    count = max(1, round(_SPAN / (time.perf_counter() - began)))
    times = []
    for _ in range(_SPANS):
        began = time.perf_counter()
        run(count)
        times.append((time.perf_counter() - began) / count)
    return times


def _peak_gb(mesh: Mesh) -> float:
    statistics = mesh.local_devices[0].memory_stats()
    if statistics is None:
        return _process_gb()
    return statistics["peak_bytes_in_use"] / 1e9


def _process_gb() -> float:
    """Most memory that the process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """So that compile times are those of compiling."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
