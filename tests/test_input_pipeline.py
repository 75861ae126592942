import hashlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from configs import default
from prn_jax import input_pipeline, splits
from prn_jax.errors import UserError
from prn_jax.input_pipeline import CategoryData, Images

SIZE = (48, 64)


def make_config(**changes):
    config = default.get_config()
    config.image_size = SIZE
    config.batch_size = 8
    config.synthesis.max_textures = 20
    config.update_from_flattened_dict(changes)
    return config


def make_data(normals=5, seen=3, is_object=True):
    """Dark images with a brighter product in the middle; the defects are bright squares on it."""
    rng = np.random.default_rng(0)

    def draw(count, defect):
        image = rng.integers(20, 40, (count, *SIZE, 3))
        image[:, 12:36, 16:48] += 80
        mask = np.zeros((count, *SIZE), np.uint8)
        if defect != "good":
            for i in range(count):
                mask[i, 15 + i : 21 + i, 20:30] = 1
            image[mask > 0] = 250
        ids = [f"{defect}/{i}" for i in range(count)]
        return Images(image.astype(np.uint8), mask, [defect] * count, ids)

    foreground = np.zeros((normals, *SIZE), np.uint8)
    foreground[:, 12:36, 16:48] = 1
    if not is_object:
        foreground[:] = 1
    train, dents, test = draw(normals, "good"), draw(seen, "dent"), draw(2, "good")
    return CategoryData(train, dents, test, test.pick([]), foreground, is_object)


def batches(config, data, **kwargs):
    return list(input_pipeline.train_batches(config, data, **{"total_steps": 6} | kwargs))


def digest(found):
    return [
        hashlib.sha256(b"".join(batch[k].tobytes() for k in sorted(batch))).hexdigest()
        for batch in found
    ]


@pytest.fixture(scope="module")
def reference():
    return batches(make_config(), make_data())


def test_a_batch_is_what_the_step_wants(reference):
    for batch in reference:
        assert batch["image"].shape == (8, *SIZE, 3)
        assert batch["mask"].shape == (8, *SIZE)
        assert batch["kind"].shape == (8,)
        assert [batch[x].dtype for x in ("image", "mask", "kind")] == [np.uint8, np.uint8, np.int32]
        assert set(np.unique(batch["mask"])) <= {0, 1}


def test_normals_are_clean_and_every_anomaly_shows(reference):
    normals = make_data().train.image
    for batch in reference:
        for image, mask, kind in zip(batch["image"], batch["mask"], batch["kind"]):
            assert mask.any() == (kind != input_pipeline.NORMAL)
            if kind == input_pipeline.NORMAL:
                assert (image == normals).all(axis=(1, 2, 3)).any()
            if kind in (input_pipeline.EXTENDED, input_pipeline.SIMULATED):
                # Its normal image is the one that it equals outside of the mask.
                outside = np.where(mask[None, ..., None] == 0, image != normals, False)
                base = normals[np.argmin(outside.sum(axis=(1, 2, 3)))]
                change = np.abs(image.astype(int) - base).max(-1)
                # What is marked whole is seen on half of it at least.
                assert (change[mask == 1] >= 8).mean() >= 0.5
                assert (change[mask == 0] == 0).all()


def test_anomalies_lie_on_the_product(reference):
    data = make_data()
    beside = data.foreground[0] == 0
    for batch in reference:
        made = np.isin(batch["kind"], (input_pipeline.EXTENDED, input_pipeline.SIMULATED))
        assert not (batch["mask"][made] * beside).any()


def test_two_runs_two_parallelisms_and_a_late_start_give_the_same_bytes(reference):
    config, data = make_config(), make_data()
    whole = digest(reference)
    assert digest(batches(config, data, parallel_calls=1)) == whole
    assert digest(batches(config, data, parallel_calls=2)) == whole
    assert digest(batches(config, data, start_step=4)) == whole[4:]
    assert digest(batches(make_config(seed=1), data)) != whole


@pytest.mark.slow
def test_a_hundred_batches_have_the_same_bytes_in_every_process():
    """With one and with two parallel calls, and from the middle on."""
    code = (
        "import json, sys; from tests.test_input_pipeline import *;"
        "calls, start = map(int, sys.argv[1:]);"
        "found = batches(make_config(), make_data(), total_steps=100,"
        " start_step=start, parallel_calls=calls);"
        "print(json.dumps(digest(found)))"
    )
    outputs = []
    for arguments in (("1", "0"), ("2", "0"), ("2", "50")):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=pathlib.Path(__file__).resolve().parent.parent,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(json.loads(result.stdout.splitlines()[-1]))
    one, two, late = outputs
    assert len(set(one)) == 100
    assert one == two
    assert late == one[50:]


def test_simulated_anomalies_stand_out_from_a_rough_texture():
    data = make_data(seen=0, is_object=False)
    rng = np.random.default_rng(0)
    data.train.image[:] = rng.integers(90, 110, data.train.image.shape[:3])[..., None]
    config = make_config(**{"sampling.normal": 0.0, "sampling.simulated": 1.0,
                            "sampling.seen": 0.0, "sampling.extended": 0.0})  # fmt: skip
    rough = float(np.median(np.abs(np.diff(data.train.image[0, ..., 0].astype(int)))))
    shares = []
    for batch in batches(config, data):
        for image, mask in zip(batch["image"], batch["mask"]):
            change = np.abs(image.astype(int) - data.train.image.astype(int)).max(-1)
            base = np.argmin((change * (1 - mask)).sum(axis=(1, 2)))
            shares.append((change[base][mask == 1] >= 8 + 0.9 * 3 * rough).mean())
    assert min(shares) >= 0.5


def test_two_hosts_make_one_host_s_batch(reference):
    config, data = make_config(), make_data()
    halves = [batches(config, data, process_index=i, process_count=2) for i in range(2)]
    for whole, first, second in zip(reference, *halves, strict=True):
        for name, value in whole.items():
            np.testing.assert_array_equal(value, np.concatenate([first[name], second[name]]))


def test_shares_are_met():
    kinds = input_pipeline.plan_kinds(make_config(), num_seen=3)
    np.testing.assert_allclose(np.bincount(kinds) / len(kinds), [0.5, 0.125, 0.125, 0.25])
    for start in range(0, 1000, 8):
        assert np.bincount(kinds[start : start + 8]).tolist() == [4, 1, 1, 2]


def test_without_seen_anomalies_the_simulated_ones_take_their_slots():
    kinds = input_pipeline.plan_kinds(make_config(), num_seen=0)
    assert np.bincount(kinds, minlength=4).tolist() == [500, 0, 0, 500]
    found = batches(make_config(), make_data(seen=0), total_steps=1)
    assert found[0]["mask"].reshape(8, -1).any(1).sum() == 4


def test_each_pass_shows_each_image_once():
    plan = input_pipeline.Plan(make_config(), num_normal=5, num_seen=3)
    kinds, drawn = (x.numpy() for x in plan(np.arange(200)))
    for kind, size in enumerate((5, 3, 5, 5)):
        images = drawn[kinds == kind]
        passes = [images[i : i + size] for i in range(0, len(images) - size, size)]
        assert all(sorted(x) == list(range(size)) for x in passes)
        assert len({tuple(x) for x in passes}) > 1
    later = plan(np.arange(90, 99))  # of any slots, in any order
    np.testing.assert_array_equal(later, (kinds[90:99], drawn[90:99]))


def test_passes_are_shuffled_anew_whatever_the_seed():
    count, passes = 60, 100
    orders = []
    for seed in (0, 256, -1):
        plan = input_pipeline.Plan(make_config(seed=seed), num_normal=count, num_seen=3)
        slots = np.arange(2 * count * passes)  # half of them are normal
        kinds, drawn = (x.numpy() for x in plan(slots))
        orders.append(drawn[kinds == 0].reshape(passes, count))
    orders = np.concatenate(orders)
    assert len({x.tobytes() for x in orders}) == len(orders)
    still = (orders == np.arange(count)).sum(axis=1)  # one, on average, of a random order
    assert still.max() < 10
    assert 0.8 < still.mean() < 1.2


def test_a_batch_that_hosts_cannot_share_is_refused():
    with pytest.raises(UserError, match="batch_size=8 cannot be divided among 3 processes"):
        batches(make_config(), make_data(), process_count=3)


def test_the_seen_split_is_cpr_s_rule():
    ids = [f"{name}/{i:03d}" for name in ("crack", "stain") for i in range(9)]
    expected = sorted(ids)
    np.random.RandomState(42).shuffle(expected)
    assert input_pipeline.seen_split(ids[::-1], 10, 42) == sorted(expected[:10])
    with pytest.raises(UserError, match="num_seen=19.*only 18"):
        splits.check_num_seen(19, "cup", 18, 18)


def test_the_first_batches_meet_their_shares(reference):
    kinds = np.concatenate([batch["kind"] for batch in reference])
    assert np.bincount(kinds).tolist() == [24, 6, 6, 12]


def test_what_is_held_out_is_a_draw_of_its_seed_that_leaves_something_to_train_on():
    ids = [f"train/good/{i:03d}" for i in range(20)]
    held = input_pipeline.holdout_split(ids[::-1], 0.1, 3)
    assert held == input_pipeline.holdout_split(ids, 0.1, 3)
    assert len(held) == 2
    assert set(held) < set(ids)
    assert len({tuple(input_pipeline.holdout_split(ids, 0.1, seed)) for seed in range(9)}) > 5
    assert input_pipeline.holdout_split(ids, 0.0, 3) == []
    assert len(input_pipeline.holdout_split(ids, 0.999, 3)) == 19
