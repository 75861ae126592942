"""Images -> masks, regions and maps, as files."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from prn_jax import predictions
from prn_jax.errors import UserError
from tests.predicting import Stub, draw, predict, table


@dataclasses.dataclass
class Spots(Stub):
    """A detector whose map is the image's brightness."""

    def inspect(self, images, batch_size, fill=False):
        found = super().inspect(images, batch_size, fill)
        return found._replace(map=[np.float32(x.mean(-1) / 255) for x in images])


def spotted(path, *spots, size=(30, 40)):
    """A grey image with bright rectangles: (row, column, height, width)."""
    image = np.full((*size, 3), 20, np.uint8)
    for row, column, height, width in spots:
        image[row : row + height, column : column + width] = 220
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_masks_and_regions_are_cut_at_the_pixel_threshold(tmp_path):
    output = tmp_path / "out"
    spotted(tmp_path / "in/a ü.png", (2, 3, 4, 5), (20, 30, 2, 3), (22, 33, 2, 1), (10, 10, 1, 1))
    spotted(tmp_path / "in/b.png")
    stub = Spots()
    (a, b) = predict(tmp_path / "in", output, stub, pixel_threshold=0.5)
    # The second touches the third by a corner.
    assert [x["area"] for x in a["regions"]] == [20, 8, 1]
    box = {x: a["regions"][1][x] for x in ("row", "column", "height", "width")}
    assert box == {"row": 20, "column": 30, "height": 4, "width": 4}
    assert a["regions"][0]["peak"] == a["regions"][0]["mean"] == pytest.approx(220 / 255, abs=1e-6)
    assert (b["regions"], b["largest"]) == ([], 0)
    assert [(x["regions"], x["largest"]) for x in table(output)] == [("3", "20"), ("0", "0")]
    mask = np.asarray(Image.open(output / "a ü_mask.png"))
    assert set(np.unique(mask)) == {0, 255}
    assert (mask == 255).sum() == 29
    # Around the regions the overlay has an outline.
    overlay = np.asarray(Image.open(output / "a ü_overlay.png"))
    assert (overlay[1, 3:8] == overlay[1, 3]).all()
    assert (overlay[1, 4] != overlay[15, 20]).any()
    # Another least area is another prediction, and so is another pixel threshold.
    (a, _) = predict(tmp_path / "in", output, stub, pixel_threshold=0.5, min_area=9)
    assert [x["area"] for x in a["regions"]] == [20]
    assert (np.asarray(Image.open(output / "a ü_mask.png")) == 255).sum() == 20
    assert stub.calls == 4
    predict(tmp_path / "in", output, stub, pixel_threshold=0.5, min_area=9, threshold=0.1)
    assert stub.calls == 4
    (a, _) = predict(tmp_path / "in", output, stub, pixel_threshold=0.95, min_area=9)
    assert (a["regions"], stub.calls) == ([], 6)


def test_maps_lie_where_the_benchmarks_own_evaluation_reads_them(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for name in ("good/000", "broken/000", "broken/001"):
        spotted(tmp_path / f"mvtec/bottle/test/{name}.png", (3, 4, 5, 6))
    images, maps = tmp_path / "mvtec/bottle/test", tmp_path / "maps"
    stub = Spots()
    predict(images, maps / "bottle/test", stub, pixel_threshold=0.5, maps="tiff")
    # <anomaly_maps_dir>/<object>/test/<defect>/<image>.tiff: one real number per pixel.
    for image in images.rglob("*.png"):
        found = tifffile.imread(maps / "bottle/test" / image.parent.name / f"{image.stem}.tiff")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, np.asarray(Image.open(image)).mean(-1) / 255, rtol=1e-6)
    # They are no images, and they are not made twice.
    with pytest.raises(
        UserError, match="there are no images.*left out 12 files of earlier predictions"
    ):
        predictions.find([str(maps)])
    predict(images, maps / "bottle/test", stub, pixel_threshold=0.5, maps="tiff")
    assert stub.calls == 3
    (maps / "bottle/test/good/000.tiff").unlink()
    predict(images, maps / "bottle/test", stub, pixel_threshold=0.5, maps="tiff")
    assert stub.calls == 4
    predict(images, maps / "bottle/test", stub, pixel_threshold=0.5, maps="npy")
    assert np.load(maps / "bottle/test/good/000_map.npy").dtype == np.float32


def test_a_map_replaces_no_image(tmp_path):
    draw(tmp_path / "a.tiff", 100)
    before = (tmp_path / "a.tiff").read_bytes()
    with pytest.raises(UserError, match=r"a.tiff would be replaced, and no prediction wrote it"):
        predict(tmp_path, tmp_path, Stub(), maps="tiff")
    assert (tmp_path / "a.tiff").read_bytes() == before
