"""Random trees in the folder layout: each is read whole, or refused in one line that names a file.

PRN_FUZZ sets how many trees are tried.
"""

import collections
import hashlib
import os
import pathlib
import tempfile

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from prn_jax import images
from prn_jax.datasets import base, folder
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
_CONTENTS = st.sampled_from(
    (*("image",) * 8, "text", "empty", "cut", "link", "broken", "loop", "folder")
)
_MASKS = st.sampled_from((*("right",) * 4, "inverted", "black", "other size", "other name", None))


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


def _make_file(draw, root: bytes) -> None:
    where = os.path.join(root, draw(_FOLDERS))
    extension = draw(st.sampled_from((*_KINDS, "PNG", "txt", "json")))
    stem = draw(_STEMS)
    path = os.path.join(where, stem + b"." + extension.encode())
    os.makedirs(where, exist_ok=True)
    if os.path.lexists(path):
        return
    content = draw(_CONTENTS)
    size = draw(st.integers(1, 40)), draw(st.integers(1, 30))
    if content == "link":
        os.symlink(os.path.join(root, b"train/good/normal.png"), path)
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
    if b"/test/" in path and content == "image" and (kind := draw(_MASKS)):
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
            else:
                with open(path, "rb") as file:
                    found[path] = hashlib.sha256(file.read()).hexdigest()
    return found


def _expected(root: bytes) -> collections.Counter[str]:
    """Counts image files by split with `os.walk`, apart from the reader; no linked folders."""
    counts = collections.Counter()
    for where, folders, files in os.walk(root):
        folders[:] = [x for x in folders if not x.startswith(b".")]
        parts = os.path.relpath(where, root).split(b"/")
        if parts[:2] != [b"train", b"good"] and not (parts[0] == b"test" and len(parts) > 1):
            continue
        for name in files:
            path = os.path.join(where, name)
            known = os.path.splitext(name)[1][1:].lower().decode("latin") in _KINDS
            if known and not name.startswith(b"."):
                assert os.path.isfile(path)  # A broken link is refused.
                counts[parts[0].decode()] += 1
    return counts


def _read(root: bytes) -> list[dict]:
    path = pathlib.Path(os.fsdecode(root))
    with tempfile.TemporaryDirectory() as data_dir:
        builder = folder.Folder.open("cup", "", data_dir)
        examples, stray = builder._scan_sorted(path)
        base.fingerprint(path, examples)
        builder._start_report(stray)
        builder._white = builder._find_white(examples)
        return [(x.split, *record) for x in examples for record in builder._generate_examples([x])]


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
        if data.draw(st.integers(0, 9)):
            Image.new("RGB", (8, 8)).save(os.path.join(os.fsdecode(root), "train/good/normal.png"))
        for _ in range(data.draw(st.integers(0, 8))):
            _make_file(data.draw, root)
        before = _listing(root)
        try:
            records = _read(root)
        except UserError as error:
            text = str(error)
            assert text.isprintable()
            assert shown(root) == text.split(": ")[0] or any(shown(x) in text for x in before)
        else:
            ids = [id_ for _, id_, _ in records]
            assert len(set(ids)) == len(ids)
            # Links to folders that are none of the tree's own are left out of the count.
            assert collections.Counter(split for split, *_ in records) == _expected(root)
            for _, _, record in records:
                assert images.decode(record["image"].getvalue()).shape[-1] == 3
        assert _listing(root) == before
