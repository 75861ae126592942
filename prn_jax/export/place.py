"""Where an export goes: only an earlier export of the same format is ever replaced.

Beside the export `NAME` lie `NAME.golden`, its golden set, and `NAME.json`, which says what the
export is and holds the SHA-256 of each file of both. What differs from that by one byte or one file
is somebody else's.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from prn_jax.errors import UserError, shown

PRODUCER = "prn_jax export"
# What lies beside the description: the ending of its name, and the field with its files' hashes.
_PARTS = {"": "files", ".golden": "golden"}


def resolve(path: str | os.PathLike) -> pathlib.Path:
    """Makes an export's path absolute.

    Raises:
      UserError: it is not a local path.
    """
    text = os.fspath(path)
    if "://" in text or not text:
        raise UserError(f"--output={shown(text)}: exports are written to a local path")
    return pathlib.Path(os.path.abspath(os.path.expanduser(text)))


def check(path: pathlib.Path, kind: str) -> None:
    """Refuses a place where anything but an earlier export of this format lies.

    Args:
      path: from `resolve`.
      kind: the format.

    Raises:
      UserError: says what lies there.
    """
    beside = _beside(path)
    with _refused(path):
        parts = {_beside(path, ending): field for ending, field in _PARTS.items()}
        existing = [x for x in (*parts, beside) if _exists(x)]
        for x in existing:
            if x.is_symlink():
                raise _occupied(x, f"is a link to {shown(os.readlink(x))}")
        about = _read(beside) if beside in existing else {}
        if beside in existing and about.get("producer") != PRODUCER:
            raise _occupied(beside, "does not describe an earlier export")
        if beside in existing and about.get("format") != kind:
            raise _occupied(path, f"is an export of the format {about.get('format')}, not {kind}")
        for part, field in parts.items():
            if part not in existing:
                continue
            what = "a folder" if part.is_dir() else "a file"
            if beside not in existing:
                raise _occupied(part, f"is {what} that no {shown(beside.name)} calls an export")
            if _contents(part) != about.get(field):
                raise _occupied(part, f"is {what} that is not as the earlier export left it")


@contextlib.contextmanager
def staged(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new empty folder on the file system of `path`, which goes with all that is left in it.

    Raises:
      UserError: it cannot be made.
    """
    base = path.parent
    while not os.path.lexists(base):  # missing folders are made when there is something for them
        base = base.parent
    with contextlib.ExitStack() as stack:
        with _refused(path):
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(dir=base, prefix=".prn_jax_export_")
            )
        yield pathlib.Path(folder)


def put(
    made: pathlib.Path, golden: pathlib.Path, path: pathlib.Path, kind: str, about: dict[str, Any]
) -> None:
    """Puts an export, its golden set and its description in their place, or leaves all as it was.

    Args:
      made: the file or folder.
      golden: the folder of the golden set.
      path: from `resolve`.
      kind: the format.
      about: for the description, plain JSON types.

    Raises:
      UserError: the place is no longer free, or cannot be written to.
    """
    check(path, kind)
    with staged(path) as folder, _refused(path):
        new, old = folder / "new", folder / "old"
        new.mkdir()
        old.mkdir()
        described = {"producer": PRODUCER, "format": kind} | about
        for source, field in zip((made, golden), _PARTS.values()):
            if source.is_dir():
                shutil.copytree(source, new / field)
            else:
                shutil.copyfile(source, new / field)
            described[field] = _contents(new / field)
        (new / "json").write_text(json.dumps(described, indent=2) + "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        targets = {field: _beside(path, ending) for ending, field in _PARTS.items()}
        targets["json"] = _beside(path)
        try:
            for name, target in targets.items():
                if os.path.lexists(target):
                    target.rename(old / name)
                (new / name).rename(target)
        except BaseException:  # an interruption too
            for name, target in targets.items():
                if not os.path.lexists(new / name):
                    target.rename(new / name)
                if os.path.lexists(old / name):
                    (old / name).rename(target)
            raise


def _beside(path: pathlib.Path, ending: str = ".json") -> pathlib.Path:
    return path.parent / f"{path.name}{ending}"


def _exists(path: pathlib.Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True  # and a name that is too long, or below a file, is an error


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, IsADirectoryError):
        return {}
    return found if isinstance(found, dict) else {}


def _contents(path: pathlib.Path) -> dict[str, str]:
    """SHA-256 of a file (as ""), or of everything below a folder."""
    if path.is_symlink() or not path.is_dir():
        return {"": _digest(path)}
    return {shown(x.relative_to(path)): _digest(x) for x in sorted(path.rglob("*"))}


def _digest(path: pathlib.Path) -> str:
    if path.is_symlink() or not path.is_file():
        return "a folder" if path.is_dir() and not path.is_symlink() else "no file"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _occupied(path: pathlib.Path, reason: str) -> UserError:
    return UserError(
        f"--output: {shown(path)} {reason}; nothing was changed: give another --output, or move "
        "away what is there"
    )


@contextlib.contextmanager
def _refused(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {shown(path)}: {error.strerror or error}") from error
