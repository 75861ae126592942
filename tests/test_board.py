"""What TensorBoard is given, read back by TensorBoard; and when a profile is recorded."""

import io
import logging

import jax
import numpy as np
import pytest
from clu import metric_writers
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.util import tensor_util

from prn_jax import board
from prn_jax.configs import demo
from prn_jax.splits import Images


def test_the_events_hold_fields_parameters_metrics_and_images(tmp_path, caplog):
    rng = np.random.default_rng(0)
    mask = np.zeros((20, 64, 96), np.uint8)
    mask[10:, 20:40, 30:60] = 1
    defects = ["good"] * 10 + ["hole"] * 6 + ["scratch"] * 4
    ids = [f"test/{x}/{i:03d}" for i, x in enumerate(defects)]
    test = Images(rng.integers(0, 60, (20, 64, 96, 3), np.uint8), mask, defects, ids)
    writer = board.create_writer(tmp_path)
    board.write_config(writer, demo.get_config())
    params = {
        "decoder": {"conv": {"kernel": np.zeros((3, 3, 2, 4), np.float32)}},
        "fuse_features": {"kernel": np.zeros((2, 5), np.float32)},
        "fuse_residuals": {"bias": np.zeros(5, np.float32)},
    }
    with caplog.at_level(logging.INFO):
        board.write_parameters(writer, params)
    assert "87 trained parameters: decoder 72, fuse 15" in caplog.text
    for step in (5, 9):
        maps = np.full((20, 64, 96), step / 10, np.float32)
        board.write_test(writer, step, test, maps, {"pro": step / 10, "image_ap": None})
    writer.close()

    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    fields = metadata.parse_session_start_info_plugin_data(content).hparams
    assert fields["batch_size"].number_value == 16
    assert fields["backbone.name"].string_value == "efficientnet_lite0"
    assert fields["image_size"].string_value == "[128, 128]"
    table = tensor_util.make_ndarray(events.Tensors("parameters")[0].tensor_proto)[()].decode()
    assert "| decoder/conv/kernel " in table
    # Title and rule first, one row for each: a table of Markdown.
    assert len(table.splitlines()) == 2 + 3
    found = [(x.step, float(tensor_util.make_ndarray(x.tensor_proto)))
             for x in events.Tensors("test/pro")]  # fmt: skip
    assert found == [(5, pytest.approx(0.5)), (9, pytest.approx(0.9))]
    tags = events.Tags()["tensors"]
    assert "test/image_ap" not in tags
    # Of each defect in turn, the same ones at each step.
    shown = {x for x in tags if x.count("/") == 2}
    assert shown == {ids[i] for i in (0, 10, 16, 1, 11, 17, 2, 12)}
    for tag in shown:
        assert [x.step for x in events.Tensors(tag)] == [5, 9]
    (*_, png) = tensor_util.make_ndarray(events.Tensors(ids[16])[0].tensor_proto)
    image = np.asarray(Image.open(io.BytesIO(png)))
    assert image.shape == (64, 192, 3)
    assert (image[:, :96] == (255, 0, 200)).all(-1).any()


@pytest.mark.parametrize(
    ("first", "count", "steps", "expected"),
    [(0, 5, 20, []), (3, 5, 20, [3, 8]), (18, 5, 20, [18, 20]), (20, 5, 20, [])],
)
def test_a_profile_covers_the_steps_that_are_asked_for(
    first, count, steps, expected, tmp_path, monkeypatch
):
    config = demo.get_config()
    config.profile.first_step, config.profile.steps = first, count
    events, now = [], 0
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append(now))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(now))
    actions = board.profile(config, tmp_path, steps)
    for now in range(1, steps + 1):  # noqa: B007
        for action in actions:
            action(now)
    assert events == expected


def test_events_that_cannot_be_written_are_said_once_and_end_nothing(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(metric_writers.SummaryWriter, "write_scalars", full)
    writer = board.create_writer(tmp_path)
    for step in range(5):
        writer.write_scalars(step, {"loss": 1.0})
    writer.close()
    ours = [x for x in caplog.records if "/clu/" not in x.pathname]
    assert len([x for x in ours if "No space left" in x.getMessage()]) == 1
