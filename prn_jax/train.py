"""Training: state, optimiser, the jitted step mapped over the mesh, the loop.

Nothing here imports TensorFlow: batches come in as NumPy arrays and metrics go out to a writer,
whoever made them.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from prn_jax import losses, pretrained
from prn_jax import mesh as meshes
from prn_jax.checkpoints import Checkpoints
from prn_jax.errors import Interrupted, UserError, shown
from prn_jax.fitting import fit_prototypes
from prn_jax.identity import Identity
from prn_jax.models.prn import PRN, SCALES, create_model
from prn_jax.models.prototypes import num_prototypes
from prn_jax.progress import Progress, Termination

Tree = Any


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
      step: steps done, int32.
      params: trained parameters.
      batch_stats: running statistics of the batch norms.
      opt_state: the optimiser's.
      average: moving averages of `params` and `batch_stats`; None without `optimizer.average`.
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    average: Tree = None

    @property
    def network(self) -> dict[str, Tree]:
        """`params` and `batch_stats` to predict with: the averages, if there are any."""
        return self.average or {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def to_resume(self) -> dict[str, Tree]:
        """What goes on from here, but for what `network` holds."""
        rest = {"step": self.step, "opt_state": self.opt_state}
        live = {"params": self.params, "batch_stats": self.batch_stats}
        return rest | live if self.average else rest


# --- schedule and optimiser -----------------------------------------------------------------------


def total_steps(config: ConfigDict, num_normal: int) -> int:
    """Steps of a run: `config.total_steps`, or `config.epochs` passes over the normal images."""
    if config.total_steps >= 0:
        return config.total_steps
    per_step = max(1, round(config.batch_size * config.sampling.normal))
    return max(1, config.epochs * num_normal // per_step)


def create_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up of at least a step, if there is one; then a cosine to 0 after the last step.

    The first step of a warm-up has the rate 0: it fills the optimiser's moments only.
    """
    share, peak = config.optimizer.warmup, config.optimizer.learning_rate
    if not share:
        return optax.cosine_decay_schedule(peak, max(1, steps))
    warmup = max(1, int(share * steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def create_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW; weight decay acts on kernels only, not on biases and batch norms.

    With `optimizer.clip`, the gradient is scaled down to that norm before.
    """

    def is_kernel(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    adamw = optax.adamw(
        create_schedule(config, steps),
        weight_decay=config.optimizer.weight_decay,
        mask=is_kernel,
    )
    clip = config.optimizer.clip

    def update(gradient, state, params=None):
        if clip:  # it has no state: a run may go on with another one, or without
            gradient, _ = optax.clip_by_global_norm(clip).update(gradient, optax.EmptyState())
        return adamw.update(gradient, state, params)

    return optax.GradientTransformation(adamw.init, update)


# --- initial state --------------------------------------------------------------------------------


def initialise(config: ConfigDict, model: PRN) -> dict[str, Tree]:
    """All collections of the network, with random values of `config.seed`, on the device."""
    image = jnp.zeros((1, *config.image_size, 3), jnp.uint8)
    # It runs once: on CPUs it is hardly optimised, which saves 10 seconds where it is not cached.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(model.init, compiler_options=options)(jax.random.key(config.seed), image)


def create_variables(config: ConfigDict, model: PRN) -> dict[str, Tree]:
    """Initial `params` and `batch_stats`, and the pretrained `backbone`, on the host.

    Random values come from `config.seed` alone, whatever the number of devices.
    """
    variables = initialise(config, model)
    own, *beside = [
        pretrained.load_backbone(
            name,
            weights,
            train_stage4=config.backbone.train_stage4,
            seed=config.seed,
            stages=4 if field == "backbone" else SCALES,  # one beside has no decoder
            field=field,
        )
        for field, name, weights in pretrained.sources(config)
    ]
    params = dict(variables.get("params", {}))
    if own["params"]:
        params["backbone"] = own["params"]
    frozen = {"backbone": own["backbone"]}
    if beside:
        frozen["beside"] = {"backbone": beside[0]["backbone"]}
    batch_stats = variables.get("batch_stats", {})
    return jax.device_get({"params": params, "batch_stats": batch_stats, "backbone": frozen})


def create_state(
    config: ConfigDict,
    variables: dict[str, Tree],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The state before the first step, of `variables` that lie on every device of the mesh."""
    network = {name: variables[name] for name in ("params", "batch_stats")}
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    return TrainState(
        meshes.replicate(mesh, np.int32(0)),
        **network,
        opt_state=meshes.replicate(mesh, jax.jit(optimizer.init)(variables["params"])),
        average=copy(network) if config.optimizer.average else None,
    )


# --- the step -------------------------------------------------------------------------------------


def make_train_step(
    config: ConfigDict, model: PRN, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Tree, Tree], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step: `(state, frozen, batch) -> (state, losses)`.

    `frozen` holds the collections `backbone` and `prototypes`; `batch` holds `image` uint8
    [b, h, w, 3] and `mask` uint8 [b, h, w], split over the mesh axis `data`. The state is donated.
    """

    def loss_fn(params, batch_stats, frozen, batch):
        own = params if model.dtype == jnp.float32 else meshes.varying(params)
        learning, updates = model.apply(
            {"params": own, "batch_stats": batch_stats, **frozen},
            batch["image"],
            method="learning",
            mutable=["batch_stats"],
        )
        mask = batch["mask"].astype(jnp.float32)
        each = [_losses(config, logits, mask) for logits in learning]
        values = jax.tree.map(lambda *x: sum(x) / len(x), *each)
        # Averaged before it is differentiated, so that the gradient is the global batch's.
        values = jax.lax.pmean(values, "data")
        return values["loss"], (values, updates["batch_stats"])

    def step(state, frozen, batch):
        gradient, (values, batch_stats) = jax.grad(loss_fn, has_aux=True)(
            state.params, state.batch_stats, frozen, batch
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Before `optimizer.clip`. And finite losses may come from parameters just ruined.
        values["gradient_norm"] = optax.global_norm(gradient)
        values["parameter_norm"] = optax.global_norm(params)
        average = state.average and optax.incremental_update(
            {"params": params, "batch_stats": batch_stats},
            state.average,
            1.0 - _decay(config.optimizer.average, state.step),
        )
        return TrainState(state.step + 1, params, batch_stats, opt_state, average), values

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    return jax.jit(mapped, donate_argnums=0)


def _losses(config: ConfigDict, logits: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """The loss on one device's part of the batch, and what it is the weighed sum of."""
    smooth_l1 = losses.smooth_l1(logits, mask)
    focal = losses.focal(logits, mask, config.loss.focal_alpha, config.loss.focal_gamma)
    loss = smooth_l1 + config.loss.focal_weight * focal
    values = {"smooth_l1": smooth_l1, "focal": focal}
    if config.loss.dice_weight:
        values["dice"] = losses.dice(logits, mask, lambda x: jax.lax.psum(x, "data"))
        loss += config.loss.dice_weight * values["dice"]
    return values | {"loss": loss}


def _decay(most: float, step: jax.Array) -> jax.Array:
    """Of the moving average: smaller in the first steps, lest the initial values stay in it."""
    return jnp.minimum(most, (1.0 + step) / (10.0 + step))


# --- the loop -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
      model: the module.
      variables: all collections it needs to predict, on every device of the mesh.
      identity: what it is made of.
      timing: seconds of training in this process, and steps done in it.
    """

    model: PRN
    variables: dict[str, Tree]
    identity: Identity
    timing: dict[str, float]


def resumable(checkpoints: Checkpoints, identity: Identity, allow_change: bool = False) -> Identity:
    """Looks whether a run may go on from the newest checkpoint, if there is one.

    Args:
      checkpoints: of the run so far.
      identity: what it is made of now.
      allow_change: go on although the checkpoint is made of something else.

    Returns:
      `identity`, with what changed on the way.

    Raises:
      UserError: naming what the checkpoint is made of otherwise.
    """
    step = checkpoints.latest_step()
    if step is None:
        return identity
    saved = checkpoints.identity()
    where = f"the checkpoint of step {step} in {shown(checkpoints.folder)}"
    identity = saved.check(identity, where, step, allow_change)
    if new := identity.changes[len(saved.changes) :]:
        logging.warning(
            "%s is made of something else (%s): going on, as --allow_config_change says",
            where, "; ".join(new),
        )  # fmt: skip
    logging.info("resumed from step %d of %d", step, identity.steps)
    if saved.steps and saved.steps != identity.steps:
        logging.warning(
            "the learning rate goes on as at step %d of a training of %d steps, not of %d",
            step, identity.steps, saved.steps,
        )  # fmt: skip
    return identity


def train(
    config: ConfigDict,
    normal_images: np.ndarray,
    make_batches: Callable[[int, int], Iterable[dict[str, np.ndarray]]],
    checkpoints: Checkpoints,
    mesh: Mesh,
    identity: Identity,
    *,
    write_scalars: Callable[[int, dict[str, float]], None] = lambda step, scalars: None,
    evaluate: Callable[[int, PRN, dict[str, Tree]], None] | None = None,
    describe: Callable[[Tree], None] = lambda params: None,
    actions: Sequence[Callable[[int], Any]] = (),
    roi: np.ndarray | None = None,
    seen_images: np.ndarray | None = None,
    begun: Callable[[], None] = lambda: None,
) -> Trained:
    """Trains one category to its last step, from the newest checkpoint if there is one.

    Args:
      config: see configs/default.py.
      normal_images: uint8 [n, h, w, 3]; prototypes are made of them.
      make_batches: `(start_step, steps) -> batches` of this process, from `start_step` on.
      checkpoints: where the run is saved and resumed from.
      mesh: devices.
      identity: what the run is made of, from `resumable`; its `steps` say how long the training is.
      write_scalars: receives the losses of a log step.
      evaluate: called with the step and the network every `config.eval_every` steps.
      describe: receives the trained parameters, before the first step.
      actions: called with each step when it is done, as CLU's periodic actions are.
      roi: where an image counts, uint8 [h, w] in {0, 1}; default: everywhere.
      seen_images: see `fit_prototypes`.
      begun: called when state and batches are there; before, what there was may be refused.

    Raises:
      UserError: the batch does not divide, the checkpoint is of another network or region of
        interest, or the loss is not finite.
      Interrupted: after SIGTERM or Ctrl-C, when the run is saved.
    """
    meshes.check_batch_size("batch_size", config.batch_size, mesh)
    steps = identity.steps
    # Normal images that came later, if that was allowed, have no part in them.
    stored = checkpoints.num_prototypes()
    clusters = stored or num_prototypes(len(normal_images), config.prototypes)
    model = create_model(config, clusters, identity.turns)
    optimizer = create_optimizer(config, steps)
    roi = np.ones(normal_images.shape[1:3], np.uint8) if roi is None else roi
    state, frozen = _start(
        config, model, optimizer, normal_images, seen_images, checkpoints, mesh, roi
    )
    start = int(state.step)
    batches = _prefetch(mesh, make_batches(start, steps)) if start < steps else iter(())
    begun()
    train_step = make_train_step(config, model, optimizer, mesh)
    if start < steps:
        describe(state.params)

    def save(step: int) -> None:
        checkpoints.save(step, state.network | frozen, state.to_resume, identity)

    progress = Progress(config, start, steps, create_schedule(config, steps), write_scalars)
    last_save = began = time.monotonic()
    with Termination() as termination, progress:
        for step, batch in enumerate(batches, start=start + 1):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = train_step(state, frozen, batch)
            progress.update(step, values)
            for action in actions:
                action(step)
            is_log_step = step % config.log_every == 0
            stop = termination.requested()
            due = _due(step, config.checkpoint.every_steps)
            if is_log_step and config.checkpoint.every_minutes:
                late = time.monotonic() - last_save > 60.0 * config.checkpoint.every_minutes
                due |= meshes.agree(late)
            # An evaluation may take longer than what stops a machine waits.
            evaluating = evaluate and _due(step, config.eval_every) and step < steps
            if due or stop or evaluating or step == steps:
                progress.check(step)
                save(step)
                last_save = time.monotonic()
            if stop:
                checkpoints.wait()
                raise Interrupted(
                    f"stopped at step {step} of {steps} and saved; the same command goes on",
                    termination.number,
                )
            if evaluating:
                progress.paused(evaluate, step, model, state.network | frozen)
        if start < steps and jax.process_count() == 1 and termination.requested():
            checkpoints.wait()
            raise Interrupted(
                "stopped after the last step; the same command evaluates", termination.number
            )
    if not steps:
        save(0)
    checkpoints.wait()
    jax.block_until_ready(state.params)
    timing = {"train_seconds": time.monotonic() - began, "train_steps": steps - start}
    return Trained(model, state.network | frozen, identity, timing)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _start(
    config, model, optimizer, normal_images, seen_images, checkpoints, mesh, roi
) -> tuple[TrainState, Tree]:
    """The newest checkpoint's state, or a fresh one with its prototypes."""
    if checkpoints.latest_step() is not None:
        network, rest = checkpoints.restore(*_abstract(config, model, optimizer, mesh))
        frozen = {name: network.pop(name) for name in ("backbone", "prototypes")}
        stored = jax.device_get(frozen["prototypes"]["interest"]["mask"])
        if not np.array_equal(stored, roi):
            raise UserError(
                f"{shown(checkpoints.folder)}: the prototypes are those of another region of "
                "interest. Put roi.png back as it was, or give another --workdir"
            )
        average = network if config.optimizer.average else None
        return TrainState(**(network | rest), average=average), frozen
    variables = meshes.replicate(mesh, create_variables(config, model))
    interest = {"interest": {"mask": meshes.replicate(mesh, roi)}}
    began = time.monotonic()
    known = variables | {"prototypes": interest}
    stored = interest | fit_prototypes(config, model, known, normal_images, mesh, seen_images)
    made = (model.num_prototypes, "prototypes") if model.trained else (model.num_patches, "patches")
    logging.info(
        "%d %s per scale (%.0f MB in all) from %d normal images in %.1f s", *made,
        sum(x.nbytes for x in jax.tree.leaves(stored)) / 1e6, len(normal_images),
        time.monotonic() - began,
    )  # fmt: skip
    state = create_state(config, variables, optimizer, mesh)
    return state, {"backbone": variables["backbone"], "prototypes": stored}


def _abstract(config, model, optimizer, mesh) -> tuple[Tree, Tree]:
    """Shapes, types and places of a checkpoint's arrays: `model`, and `optimizer`."""
    height, width = config.image_size
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    network = {"params": {}, "batch_stats": {}}
    network |= jax.eval_shape(model.init, jax.random.key(0), image)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        network["params"],
        network["batch_stats"],
        jax.eval_shape(optimizer.init, network["params"]),
        network if config.optimizer.average else None,
    )
    everywhere = jax.sharding.NamedSharding(mesh, P())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        (network, state.to_resume),
    )


def _prefetch(mesh: Mesh, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[Tree]:
    """Puts each next batch on the devices while the current step runs."""
    ahead = None
    for batch in batches:
        following = meshes.shard(mesh, {name: batch[name] for name in ("image", "mask")})
        if ahead is not None:
            yield ahead
        ahead = following
    if ahead is not None:
        yield ahead
