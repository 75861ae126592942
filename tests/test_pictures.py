import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from prn_jax import pictures
from prn_jax.errors import UserError
from prn_jax.splits import Images


def test_an_outline_leaves_the_defect_itself_visible():
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3)).astype(np.uint8)
    mask = np.zeros((64, 80), np.uint8)
    mask[10:20, 30:50] = 1
    drawn = pictures.outline(image, mask)
    changed = (drawn != image).any(-1)
    assert not changed[mask > 0].any()
    ring = ndimage.binary_dilation(mask) & (mask == 0)
    assert (drawn[ring] == drawn[9, 30]).all()
    assert not changed[~ring].any()
    np.testing.assert_array_equal(pictures.outline(image, np.zeros_like(mask)), image)


def test_heat_grows_lighter():
    colours = pictures.heat(np.linspace(0, 1, 50)[None])[0].astype(float)
    luminance = colours @ [0.299, 0.587, 0.114]
    assert (np.diff(luminance) > 0).all()
    np.testing.assert_array_equal(pictures.heat(np.array([[-1.0, 2.0]])), colours[None, [0, -1]])


def test_an_overlay_shows_the_map():
    image = np.full((8, 8, 3), 120, np.uint8)
    values = np.zeros((8, 8))
    values[2:4, 2:4] = 1.0
    shown = pictures.overlay(image, values)
    assert shown[2, 2].astype(int).sum() > shown[0, 0].astype(int).sum() + 150


@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_the_results_sheet_shows_the_hardest_of_each_defect(size, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    shown, draw = [], pictures.contact_sheet
    monkeypatch.setattr(pictures, "contact_sheet", lambda rows: shown.extend(rows) or draw(rows))
    count = 9
    images = rng.integers(0, 256, (count, *size, 3)).astype(np.uint8)
    masks = np.zeros((count, *size), np.uint8)
    defects = ["good"] * 3 + ["dent"] * 6
    test = Images(images, masks, defects, [f"test/{i}" for i in range(count)])
    scores = rng.random(count)
    sheet = pictures.results_sheet(test, rng.random((count, *size)), scores)
    assert [title for title, _ in shown] == [
        "good: the highest scores of 3",
        "dent: the lowest scores of 6",
    ]
    hardest = np.argsort(-scores[:3]), 3 + np.argsort(scores[3:])[:4]
    for (_, cells), numbers in zip(shown, hardest, strict=True):
        below = [caption for i in numbers for caption in (str(i), f"score {scores[i]:.3f}")]
        assert [caption for _, caption in cells] == below
    assert sheet.width > 400
    assert sheet.height > 300
    pictures.save_png(tmp_path / "a" / "sheet.png", sheet)
    with Image.open(tmp_path / "a" / "sheet.png") as read:
        np.testing.assert_array_equal(np.asarray(read), np.asarray(sheet))


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*x.png"):
        pictures.save_png(tmp_path / "file" / "x.png", Image.new("RGB", (4, 4)))


def test_what_is_below_a_narrow_image_is_whole(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        pictures.ImageDraw.ImageDraw,
        "text",
        lambda _, place, text, *__: drawn.append((*place, text)),
    )
    cells = [
        (np.zeros((160, 20, 3), np.uint8), "score 0.123"),
        (np.zeros((160, 20, 3), np.uint8), "b"),
    ]
    title = "a defect with a long name: the lowest scores of 18"
    sheet = pictures.contact_sheet([(title, cells)])
    assert [text for *_, text in drawn] == [title, "score 0.123", "b"]
    (_, _, _), (first, _, _), (second, _, _) = drawn
    assert second - first >= pictures.ImageFont.load_default(12).getlength("score 0.123")
    assert sheet.width >= pictures.ImageFont.load_default(16).getlength(title)
