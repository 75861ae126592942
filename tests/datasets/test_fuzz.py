"""Random trees in the folder layout: each is read whole, or refused in one line that names a file.

PRN_FUZZ sets how many trees are tried.
"""

import collections
import hashlib
import os
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from prn_jax import images
from prn_jax.datasets import folder, raw
from prn_jax.errors import UserError, shown

_KINDS = {
    "png": ("1", "L", "LA", "RGB", "RGBA", "P", "I;16"),
    "jpg": ("L", "RGB", "CMYK"),
    "bmp": ("1", "L", "RGB", "P"),
    "tiff": ("1", "L", "RGB", "RGBA", "CMYK", "I;16", "F", "P"),
    "webp": ("RGB", "RGBA"),
    "gif": ("L", "P"),
    "pgm": ("L",),
}
_COUNTS = collections.Counter()
_STEMS = st.one_of(
    st.sampled_from(
        (
            *(b"0", b"1", b"a[2]", b"a*b", b"a\nb", b"pi\xe8ce", b"._x", b".x", b"a.b", b"%s {x}"),
            *("\u96ea\u00fc".encode(), b"x" * 200, b"0_mask", b"0_gt", b" ", b"-q"),
        )
    ),
    st.binary(min_size=1, max_size=12).filter(lambda x: not set(x) & set(b"/\0")),
)
_FOLDERS = st.sampled_from(
    (
        *(b"train/good", b"train/good", b"train/good/2024", b"test/good", b"test/dent"),
        *(b"test/dent/a", b"test/cut[2]", b"test/pi\xe8ce", b"test/OK", b"train/good/.hidden"),
        *(b"ground_truth/dent", b"ground_truth/cut[2]", b"ground_truth/good", b"notes", b"test"),
    )
)
_GOOD = ("image",) * 8 + ("link", "sibling", "folder", "no image")
_BAD = ("text", "empty", "cut", "broken", "loop", "closed")
_GOOD_MASKS = ("right",) * 4 + ("inverted", "black", None)
_BAD_MASKS = ("other size", "other name")
# Where an image is always the right thing, and where it often is a slip.
_PLAIN = st.sampled_from((b"train/good", b"train/good/2024", b"test/good", b"test/dent",
                          b"test/dent/a", b"test/cut[2]", b"test/pi\xe8ce"))  # fmt: skip


def _picture(draw, extension: str, size: tuple[int, int]) -> Image.Image:
    mode = draw(st.sampled_from(_KINDS[extension]))
    seed = draw(st.integers(0, 99))
    pixels = np.random.RandomState(seed).randint(0, 256, (*size[::-1], 3)).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 16)
    return Image.fromarray(pixels).convert(mode)


def _write(draw, path: bytes, extension: str, size: tuple[int, int]) -> None:
    image = _picture(draw, extension, size)
    options = {}
    if extension in ("jpg", "png", "webp") and draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(1, 8))
        options["exif"] = exif
    with open(path, "wb") as file:
        image.save(file, {"jpg": "JPEG", "pgm": "PPM"}.get(extension, extension.upper()), **options)


def _make_file(draw, root: bytes, harmless: bool) -> None:
    """One more file, link or folder; harmless ones leave a readable tree readable."""
    where = os.path.join(root, draw(_PLAIN if harmless else _FOLDERS))
    extension = draw(st.sampled_from((*_KINDS, "PNG", "txt", "json")))
    stem = draw(_STEMS)
    path = os.path.join(where, stem + b"." + extension.encode())
    os.makedirs(where, exist_ok=True)
    if os.path.lexists(path):
        return
    content = draw(st.sampled_from(_GOOD if harmless else _GOOD + _BAD))
    size = draw(st.integers(1, 40)), draw(st.integers(1, 30))
    if content == "link":
        os.symlink(os.path.join(root, b"train/good/normal.png"), path)
    elif content == "sibling":
        os.symlink(os.path.join(root, draw(_PLAIN)), os.path.splitext(path)[0])
    elif content == "no image":
        open(os.path.splitext(path)[0] + b".heic", "wb").close()
    elif content == "broken":
        os.symlink(b"nowhere.png", path)
    elif content == "loop":
        os.symlink(draw(st.sampled_from((b"..", b".", b"../../..", os.path.basename(path)))), path)
    elif content == "folder":
        os.mkdir(path)
    elif content == "empty" or extension in ("txt", "json"):
        open(path, "wb").close()
    elif content == "text":
        pathlib.Path(os.fsdecode(path)).write_text("no image")
    else:
        _write(draw, path, extension.lower(), size)
        if content == "cut":
            os.truncate(path, draw(st.integers(0, os.path.getsize(path) - 1)))
        if content == "closed":
            os.chmod(path, 0)
    kinds = _GOOD_MASKS if harmless else _GOOD_MASKS + _BAD_MASKS
    defect = b"/test/" in path and (not harmless or b"/test/good" not in path)
    if defect and content == "image" and (kind := draw(st.sampled_from(kinds))):
        _make_mask(path, size, kind)


def _make_mask(path: bytes, size: tuple[int, int], kind: str) -> None:
    where, name = os.path.split(path.replace(b"/test/", b"/ground_truth/"))
    stem = os.path.splitext(name)[0]
    mask = np.zeros(size[::-1], np.uint8)
    mask[:1, :1] = 0 if kind == "black" else 255
    mask = 255 - mask if kind == "inverted" else mask
    mask = np.zeros((50, 50), np.uint8) if kind == "other size" else mask
    target = os.path.join(where, stem + (b"_gt" if kind == "other name" else b"_mask") + b".png")
    if len(os.path.basename(target)) < 255 and not os.path.lexists(target):
        os.makedirs(where, exist_ok=True)
        with open(target, "wb") as file:
            Image.fromarray(mask).save(file, "PNG")


def _listing(root: bytes) -> dict[bytes, str]:
    found = {}
    for where, folders, files in os.walk(root):
        for path in (os.path.join(where, x) for x in folders + files):
            if os.path.islink(path):
                found[path] = "-> " + os.fsdecode(os.readlink(path))
            elif os.path.isdir(path):
                found[path] = "folder"
            elif not os.access(path, os.R_OK):
                found[path] = "closed"
            else:
                with open(path, "rb") as file:
                    found[path] = hashlib.sha256(file.read()).hexdigest()
    return found


def _is_image(path: bytes) -> bool:
    name = os.path.basename(path)
    known = os.path.splitext(name)[1][1:].lower().decode("latin") in _KINDS
    return known and not name.startswith(b".") and not os.path.isdir(path)


def _expected(root: bytes) -> collections.Counter[str]:
    """Counts image files by split, apart from the reader: each folder once, by its true place.

    What a link leads to is counted where it lies if that is in the same folder of the layout, else
    where the link is.
    """
    counts = collections.Counter()
    tops = [os.path.join(root, b"train/good")]
    test = os.path.join(root, b"test")
    for name in os.listdir(test) if os.path.isdir(test) else ():
        if not name.startswith(b".") and os.path.isdir(os.path.join(test, name)):
            tops.append(os.path.join(test, name))
    for top in filter(os.path.isdir, tops):
        above = {os.path.realpath(os.path.join(top, *[b".."] * up)) for up in range(1, 30)}
        places = {}
        for where, folders, files in os.walk(top, followlinks=False):
            folders[:] = [x for x in folders if not x.startswith(b".")]
            places[os.path.realpath(where)] = files
        linked = [os.path.join(x, y) for x in places for y in os.listdir(x)]
        while linked:
            path = linked.pop()
            place = os.path.realpath(path)
            if os.path.basename(path).startswith(b".") or not os.path.islink(path):
                continue
            if not os.path.isdir(path) or place in places or place in above:
                continue
            for where, folders, files in os.walk(place, followlinks=False):
                folders[:] = [x for x in folders if not x.startswith(b".")]
                if os.path.realpath(where) not in places:
                    places[os.path.realpath(where)] = files
                    linked += [os.path.join(where, x) for x in os.listdir(where)]
        split = os.path.relpath(top, root).split(b"/")[0].decode()
        counts[split] += sum(_is_image(os.path.join(x, y)) for x in places for y in places[x])
    return +counts


def _blamed(text: str, listing: dict[bytes, str]) -> list[bytes]:
    """The files and folders that a message names, the longest names of those that begin alike."""
    named = [x for x in listing if shown(x) in text]
    return [x for x in named if not any(x != y and y.startswith(x) for y in named)]


def _is_wrong(path: bytes, listing: dict[bytes, str]) -> bool:
    """Whether there is a reason to refuse a file, found apart from the reader."""
    if os.path.isdir(path):  # a misnamed folder, or one that is all there is
        return True
    stem = os.path.splitext(path)[0]
    if sum(os.path.splitext(x)[0] == stem for x in listing) > 1 or b"ground_truth" in path:
        return True
    if any(os.path.basename(stem).endswith(x) for x in (b"_mask", b"_gt")):
        return True
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode == "F":
                return True
    except (OSError, SyntaxError, ValueError, EOFError):
        return True
    mask = stem.replace(b"/test/", b"/ground_truth/")
    return any(os.path.splitext(x)[0] in (mask, mask + b"_mask") for x in listing)


def _read(root: bytes) -> list[dict]:
    path = pathlib.Path(os.fsdecode(root))
    with tempfile.TemporaryDirectory() as data_dir:
        builder = folder.Folder.open("cup", "", data_dir)
        examples, stray = builder._scan_sorted(path)
        raw.fingerprint(path, examples)
        builder._start_report(stray)
        builder._region = None
        builder._white = raw.find_white("cup", examples)
        return [(x.split, made) for x in examples for _, made in builder._generate_examples([x])]


@settings(
    max_examples=int(os.environ.get("PRN_FUZZ", "120")),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_any_tree_is_read_whole_or_refused_in_a_line(data):
    with tempfile.TemporaryDirectory() as temporary:
        root = os.path.join(os.fsencode(os.path.realpath(temporary)), b"cup")
        os.makedirs(os.path.join(root, b"train/good"))
        harmless = data.draw(st.booleans())
        if harmless or data.draw(st.integers(0, 9)):
            Image.new("RGB", (8, 8)).save(os.path.join(os.fsdecode(root), "train/good/normal.png"))
        for _ in range(data.draw(st.integers(0, 8))):
            _make_file(data.draw, root, harmless)
        before = _listing(root)
        try:
            records = _read(root)
        except UserError as error:
            text = str(error)
            assert text.isprintable()
            if shown(root) == text.split(": ")[0]:
                assert "no training images" in text
            else:
                blamed = _blamed(text, before)
                assert blamed
                assert any(_is_wrong(x, before) for x in blamed), text
        else:
            ids = [record["id"] for _, record in records]
            assert len(set(ids)) == len(ids)
            assert collections.Counter(split for split, *_ in records) == _expected(root)
            for _, record in records:
                assert images.decode(record["image"].getvalue()).shape[-1] == 3
            _COUNTS["read"] += 1
        assert _listing(root) == before
        _COUNTS["trees"] += 1


def test_many_of_the_trees_were_read():
    assert _COUNTS["read"] > 0.3 * _COUNTS["trees"] > 0


def test_folders_that_may_not_be_read_are_named(tmp_path):
    (tmp_path / "train/good/closed").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "train/good/normal.png")
    (tmp_path / "train/good/closed").chmod(0)
    try:
        if os.access(tmp_path / "train/good/closed", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(UserError, match="train/good/closed: cannot be read: Permission denied"):
            _read(os.fsencode(tmp_path))
    finally:
        (tmp_path / "train/good/closed").chmod(0o700)
