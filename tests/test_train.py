import functools
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from configs import default
from prn_jax import fitting, train
from prn_jax import mesh as meshes
from prn_jax.checkpoints import Checkpoints
from prn_jax.errors import Interrupted, UserError
from prn_jax.identity import Identity, as_dict
from prn_jax.progress import Progress
from tests import tiny


def small_config(**changes):
    """A run of seconds."""
    tiny.register()
    config = default.get_config()
    config.total_steps = 4
    config.log_every = 2
    config.optimizer.learning_rate = 1e-3
    config.checkpoint.every_steps = 2
    config.dtype = "float32"
    config.update_from_flattened_dict(tiny.FIELDS | changes)
    return config


def make_batches(config, poison_at=None):
    """Stands in for the input pipeline: batches that are a function of the step alone."""

    def batches(start, steps):
        for step in range(start, steps):
            rng = np.random.default_rng(step)
            image = rng.integers(0, 256, (config.batch_size, *config.image_size, 3), np.uint8)
            yield {"image": image, "mask": (image[..., 0] > 200).astype(np.uint8)}

    return batches


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (22, 64, 64, 3), np.uint8)


def made_of(config, images):
    """The identity of a run without files."""
    steps = train.total_steps(config, len(images))
    return Identity("folder", "noise", "abc", (), steps, 0, as_dict(config))


def run(config, images, folder, devices=1, allow_change=False, **kwargs):
    mesh = meshes.create_mesh(jax.devices()[:devices])
    checkpoints = Checkpoints(folder, config.checkpoint.keep)
    try:
        identity = train.resumable(checkpoints, made_of(config, images), allow_change)
        return train.train(
            config, images, make_batches(config), checkpoints, mesh, identity, **kwargs
        )  # fmt: skip
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    return run(small_config(), images, tmp_path_factory.mktemp("whole"))


def assert_same(a, b, **tolerance):
    leaves = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
    for (path, x), y in leaves:
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)


@pytest.mark.parametrize(("looks", "merge"), [((0,), "mean"), ((-1, 0), "mean"), ((-1, 0), "max")])
def test_the_loss_is_smooth_l1_and_weighed_focal(images, looks, merge):
    """Against NumPy in float64, of the logits that the network had before the step.

    So are the norms' running statistics: they take in a tenth of the batch's.
    """
    config = small_config(**{"loss.focal_weight": 3.0, "loss.focal_alpha": 0.3,
                             "loss.focal_gamma": 2.0, "backbone.merge": merge,
                             "backbone.doublings": looks, "optimizer.clip": 0.0})  # fmt: skip
    mesh = meshes.create_mesh(jax.devices()[:1])
    model = train.create_model(config, 2)
    variables = meshes.replicate(mesh, train.initialise(config, model))
    (batch,) = make_batches(config)(0, 1)

    def forward(*of):
        # Whatever is learnt from, what each look gives by itself.
        found, noted = model.clone(merge="max").apply(
            *of,
            method="learning",
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, nn.Conv),
        )
        return jnp.stack(found, axis=1), noted["intermediates"]

    mapped = jax.shard_map(forward, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    logits, convs = jax.jit(mapped)(variables, batch["image"])
    optimizer = train.create_optimizer(config, 4)
    state = train.create_state(config, variables, optimizer, mesh)
    frozen = {name: variables[name] for name in ("backbone", "prototypes") if name in variables}
    step = train.make_train_step(config, model, optimizer, mesh)
    after, values = step(state, frozen, meshes.shard(mesh, batch))
    # AdamW's first moment is a tenth of the first gradient.
    moments = jax.tree.leaves(optax.tree.get(after.opt_state, "mu"))
    norm = np.sqrt(sum(np.sum(np.square(10 * np.float64(x))) for x in moments))
    assert values["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    logits = np.float64(logits)  # [b, looks, h, w]
    logits = logits if merge == "max" else logits.mean(axis=1, keepdims=True)
    p, truth = 1 / (1 + np.exp(-logits)), batch["mask"][:, None] == 1
    towards = np.where(truth, p, 1 - p)
    focal = -np.where(truth, 0.3, 0.7) * (1 - towards) ** 2 * np.log(towards)
    expected = 0.5 * np.mean((p - truth) ** 2) + 3 * np.mean(focal)
    assert values["loss"] == pytest.approx(expected, rel=1e-4)
    convs = flatten_dict(convs)
    kept = flatten_dict(jax.device_get(after.batch_stats))
    assert len(kept) == 2 * len(looks) * 8
    for (*path, _, kind), found in kept.items():
        before = np.float64(convs[(*path, "Conv_0", "__call__")][0])
        batch_s = getattr(before, kind)(axis=(0, 1, 2))
        initial = {"mean": 0.0, "var": 1.0}[kind]
        np.testing.assert_allclose(found, 0.9 * initial + 0.1 * batch_s, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 4])
def test_gradients_of_a_network_in_bfloat16_are_summed_as_float32(devices):
    config = small_config(dtype="bfloat16", **{"attention.layers": 1})
    mesh = meshes.create_mesh(jax.devices()[:devices])
    model, optimizer = train.create_model(config, 2), train.create_optimizer(config, 4)
    variables = meshes.replicate(mesh, train.initialise(config, model))
    state = train.create_state(config, variables, optimizer, mesh)
    frozen = {name: variables[name] for name in ("backbone", "prototypes") if name in variables}
    (batch,) = make_batches(config)(0, 1)
    step = train.make_train_step(config, model, optimizer, mesh)
    graph = str(step.trace(state, frozen, meshes.shard(mesh, batch)).jaxpr)
    sums = [line for line in graph.splitlines() if "= psum" in line]
    assert len(sums) > len(jax.tree.leaves(variables["params"]))
    assert ":bf16[" in graph
    assert not [line for line in sums if ":bf16[" in line]


def test_decay_is_of_kernels_alone_and_warm_up_of_at_least_a_step_or_none():
    config = small_config(**{"optimizer.weight_decay": 0.5, "optimizer.warmup": 0.0})
    optimizer = train.create_optimizer(config, 4)
    params = {"conv": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)}}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["conv"]["kernel"], -0.5e-3)
    assert not np.any(updates["conv"]["bias"])
    assert not np.any(updates["norm"]["scale"])
    assert train.create_schedule(config, 4)(0) == pytest.approx(1e-3)
    assert train.create_schedule(config, 0)(0) == pytest.approx(1e-3)  # nothing is trained
    config.optimizer.warmup = 0.1
    rates = [float(train.create_schedule(config, 4)(i)) for i in range(5)]
    assert rates == pytest.approx([0, 1e-3, 0.75e-3, 0.25e-3, 0])


def test_a_checkpoint_is_due_after_so_many_minutes_at_a_log_step(images, tmp_path):
    fields = {"checkpoint.every_steps": 0, "checkpoint.every_minutes": 1e-9,
              "checkpoint.keep": 9, "total_steps": 5}  # fmt: skip
    run(small_config(**fields), images, tmp_path)
    assert {x.name for x in tmp_path.iterdir() if x.name.isdigit()} == {"2", "4", "5"}


@pytest.mark.slow
def test_eight_devices_make_the_step_of_one(images):
    """Same parameters, same batch: same losses, batch statistics and updated parameters.

    In float64, but for the prototypes, the distances to them, and the losses.
    """
    fields = {"attention.layers": 1, "fusion.enabled": True, "loss.dice_weight": 0.5,
              "decoder.width": 0.25}  # fmt: skip
    config = small_config(batch_size=16, **fields)
    batch = next(iter(make_batches(config)(0, 1)))
    outcomes = []
    for count in (1, 8):
        mesh = meshes.create_mesh(jax.devices()[:count])
        model = train.create_model(config, 2)
        # Plain gradient descent: Adam's first step is the sign of the gradient, which rounding
        # flips where the gradient is 0; nor would Adam show a gradient of a wrong scale.
        optimizer = train.optax.sgd(1.0)
        variables = train.create_variables(config, model)
        stored = fitting.fit_prototypes(
            config, model, meshes.replicate(mesh, variables), images, mesh
        )
        with jax.enable_x64(True):
            model = model.clone(dtype=np.float64)
            variables = jax.tree.map(np.float64, variables)
            before = variables["params"]
            variables = meshes.replicate(mesh, variables)
            frozen = {"backbone": variables["backbone"], "prototypes": stored}
            state = train.create_state(config, variables, optimizer, mesh)
            step = train.make_train_step(config, model, optimizer, mesh)
            state, values = step(state, frozen, meshes.shard(mesh, batch))
        # With a rate of 1 the change of a parameter is its gradient.
        gradient = jax.tree.map(lambda old, new: old - new, before, jax.device_get(state.params))
        outcomes.append((*jax.device_get((stored, values, state.batch_stats)), gradient))
    one, eight = outcomes
    assert_same(one[0], eight[0], rtol=1e-4, atol=1e-5)
    assert_same(one[1], eight[1], rtol=1e-6)
    assert_same(one[2], eight[2], rtol=1e-5, atol=1e-7)
    for a, b in zip(jax.tree.leaves(one[3]), jax.tree.leaves(eight[3]), strict=True):
        assert np.linalg.norm(a - b) <= 5e-4 * np.linalg.norm(a) + 1e-7


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(images, tmp_path, uninterrupted):
    class Stop(Exception):
        pass

    def stop(step, scalars):
        if step >= 2:
            raise Stop

    with pytest.raises(Stop):
        # The progress report of step 2 comes in before its checkpoint: nothing is saved yet.
        run(small_config(), images, tmp_path / "a", write_scalars=stop)
    config = small_config()
    calls = []

    def evaluate(step, model, variables):
        calls.append(step)
        raise Stop

    with config.unlocked():
        config.eval_every = 1
    with pytest.raises(Stop):
        run(config, images, tmp_path / "a", evaluate=evaluate)
    assert calls == [1]
    checkpoints = Checkpoints(tmp_path / "a")
    assert checkpoints.latest_step() == 1  # saved before it was evaluated
    checkpoints.close()
    resumed = run(small_config(), images, tmp_path / "a")
    assert_same(resumed.variables, uninterrupted.variables, rtol=0, atol=0)
    assert resumed.timing["train_steps"] == 3


@pytest.mark.slow
def test_a_moving_average_of_the_weights_is_kept(images, tmp_path):
    """Every step's weights and statistics, averaged in float64: with these a resumed run ends."""
    fields = {"optimizer.average": 0.3, "optimizer.clip": 0.5}
    live = []

    class Stop(Exception):
        pass

    def stop(step, *_):
        raise Stop

    config = small_config(**fields, total_steps=4)
    with pytest.raises(Stop):
        run(small_config(**fields, eval_every=2), images, tmp_path, evaluate=stop)
    resumed = run(config, images, tmp_path)
    assert resumed.timing["train_steps"] == 2
    mesh = meshes.create_mesh(jax.devices()[:1])
    model, optimizer = resumed.model, train.create_optimizer(config, 4)
    variables = meshes.replicate(mesh, train.create_variables(config, model))
    stored = fitting.fit_prototypes(config, model, variables, images, mesh)
    frozen = {"backbone": variables["backbone"], "prototypes": stored}
    state = train.create_state(config, variables, optimizer, mesh)
    step = train.make_train_step(config, model, optimizer, mesh)

    def weights(tree):
        return {name: jax.device_get(tree[name]) for name in ("params", "batch_stats")}

    expected = jax.tree.map(np.float64, weights(vars(state)))
    for number, batch in enumerate(make_batches(config)(0, 4)):
        state, _ = step(state, frozen, meshes.shard(mesh, batch))
        live.append(weights(vars(state)))
        decay = min(0.3, (1 + number) / (10 + number))
        mix = functools.partial(np.average, axis=0, weights=[decay, 1 - decay])
        expected = jax.tree.map(lambda *x, mix=mix: mix(np.stack(x)), expected, live[-1])
    kept = weights(resumed.variables)
    assert_same(kept, expected, rtol=1e-5, atol=1e-6)
    for name, tree in kept.items():
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(live[-1][name]), strict=True)
        assert any(np.abs(a - b).max() > 1e-4 for a, b in pairs)


@pytest.mark.parametrize(("clip", "norm"), [(0.5, 0.5), (100.0, 10.0), (0.0, 10.0)])
def test_the_gradient_is_clipped_to_its_norm(clip, norm):
    """AdamW's first moment is a tenth of the gradient that comes in."""
    optimizer = train.create_optimizer(small_config(**{"optimizer.clip": clip}), 10)
    params = {"kernel": jnp.zeros(4)}
    state = optimizer.init(params)
    _, state = optimizer.update({"kernel": jnp.full(4, 5.0)}, state, params)
    moment = next(x for x in jax.tree.leaves(state) if x.shape == (4,))
    assert np.linalg.norm(moment) == pytest.approx(0.1 * norm, rel=1e-5)
    # A run may go on with another limit, or with none.
    other = train.create_optimizer(small_config(**{"optimizer.clip": 7.0}), 10).init(params)
    assert jax.tree.structure(other) == jax.tree.structure(state)


@pytest.mark.slow
def test_what_was_there_stays_where_there_are_no_batches(images, tmp_path):
    def refuse(start, steps):
        raise UserError("a texture is damaged")

    checkpoints, began = Checkpoints(tmp_path, 1), []
    arguments = images, refuse, checkpoints, meshes.create_mesh(jax.devices()[:1])
    with pytest.raises(UserError, match="a texture is damaged"):
        train.train(
            small_config(), *arguments, made_of(small_config(), images),
            begun=lambda: began.append(1),
        )  # fmt: skip
    assert not began


@pytest.mark.slow
def test_a_finished_run_only_loads(images, tmp_path, uninterrupted):
    run(small_config(), images, tmp_path)
    again = run(small_config(), images, tmp_path)
    assert again.timing["train_steps"] == 0
    assert_same(again.variables, uninterrupted.variables, rtol=0, atol=0)


@pytest.mark.slow
def test_a_stop_while_the_last_step_is_saved_is_a_stop(images, tmp_path, monkeypatch):
    save = Checkpoints.save

    def stopped(checkpoints, step, *parts):
        save(checkpoints, step, *parts)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", stopped)
    with pytest.raises(Interrupted, match="stopped after the last step") as stop:
        run(small_config(), images, tmp_path)
    assert stop.value.number == signal.SIGTERM
    assert run(small_config(), images, tmp_path).timing["train_steps"] == 0


@pytest.mark.slow
def test_another_configuration_is_refused_by_name(images, tmp_path):
    run(small_config(total_steps=1), images, tmp_path)
    with pytest.raises(UserError, match=r"optimizer.learning_rate was 0.001, is 0.5"):
        run(small_config(total_steps=1, **{"optimizer.learning_rate": 0.5}), images, tmp_path)
    run(
        small_config(total_steps=2, **{"optimizer.learning_rate": 0.5}),
        images,
        tmp_path,
        allow_change=True,
    )


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(images, tmp_path):
    config = small_config(**{"optimizer.learning_rate": 1e30})  # from the second step on
    with pytest.raises(UserError, match=r"parameter_norm is (inf|nan) at step 2"):
        run(config, images, tmp_path)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() is None
    checkpoints.close()


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_gradient_that_is_not_finite_is_told_what_would_mend_it(clip):
    config = small_config(**{"optimizer.clip": clip})
    schedule = train.create_schedule(config, 4)
    with Progress(config, 0, 4, schedule, lambda step, scalars: None) as progress:
        progress.update(1, {"gradient_norm": jnp.array(np.inf)})
        with pytest.raises(UserError, match="gradient_norm is inf at step 1") as error:
            progress.check(1)
    assert ("set optimizer.clip" in str(error.value)) == (not clip)


@pytest.mark.slow
def test_the_loop_hands_nothing_over_but_its_batches(images, tmp_path):
    """An implicit transfer would make the host wait for the device, or the device for the host."""
    config = small_config(total_steps=7, **{"checkpoint.every_steps": 0})
    lines = []

    def batches(start, steps):
        for step, batch in enumerate(make_batches(config)(start, steps)):
            # Not while the first step is compiled, nor while the last one is saved.
            jax.config.update("jax_transfer_guard", "disallow" if 2 <= step < 6 else "allow")
            yield batch

    checkpoints = Checkpoints(tmp_path)
    try:
        train.train(
            config, images, batches, checkpoints, meshes.create_mesh(jax.devices()[:2]),
            made_of(config, images),
            write_scalars=lambda step, scalars: lines.append(step),
        )  # fmt: skip
    finally:
        jax.config.update("jax_transfer_guard", "allow")
        checkpoints.close()
    assert lines == [2, 4, 6, 7]


def test_frozen_variables_are_no_parameters():
    model = train.create_model(small_config(**{"backbone.name": "resnet18"}), 2)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    stages = {name.split("_")[0] for name in variables["params"]["backbone"]}
    assert stages == {"layer4"}
    assert set(variables) == {"params", "batch_stats", "backbone", "prototypes"}


def test_the_schedule_warms_up_and_ends_at_zero():
    config = small_config()
    schedule = train.create_schedule(config, 100)
    values = np.array([schedule(i) for i in range(101)])
    assert values[0] == 0.0
    assert values[10] == pytest.approx(config.optimizer.learning_rate)
    assert values[100] == pytest.approx(0.0, abs=1e-9)
    assert np.all(np.diff(values[:11]) > 0)
    assert np.all(np.diff(values[10:]) < 0)


@pytest.mark.parametrize(
    ("epochs", "steps", "normals", "expected"),
    [(700, -1, 209, 36575), (700, 600, 209, 600), (700, 0, 209, 0)],
)
def test_total_steps(epochs, steps, normals, expected):
    config = small_config(epochs=epochs, total_steps=steps)
    assert train.total_steps(config, normals) == expected


def test_a_batch_that_does_not_divide_is_refused(images, tmp_path):
    with pytest.raises(UserError, match="batch_size=6 cannot be divided among 8 devices"):
        run(small_config(batch_size=6), images, tmp_path, devices=8)
