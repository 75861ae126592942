"""Files that are complete or not there, and arrays that need not fit into memory.

A large array lies in a file without a name in the folder for temporary files (TMPDIR), which is
gone when the array is, or the process. The system keeps of it in memory what there is room for.
"""

import contextlib
import math
import os
import tempfile
import uuid
from collections.abc import Sequence

import numpy as np
from etils import epath

from prn_jax.errors import UserError, as_os_errors, shown

# Bytes; smaller arrays are held in memory.
LARGE = 2**29


def zeros(shape: Sequence[int], dtype: np.typing.DTypeLike) -> np.ndarray:
    """As `np.zeros`, but a large array lies on disk.

    Raises:
      UserError: the disk has no room for it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE:
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile() as file:
            # A disk that is full at the first write to an array would end the process.
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "r+", shape=tuple(shape))
    except OSError as error:
        raise UserError(
            f"the images take {size / 2**30:.1f} GiB of the disk of {shown(tempfile.gettempdir())} "
            f"while they are in use: {error.strerror or error}; TMPDIR names another folder"
        ) from error


def rows(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """As `array[index]`; all rows in order are not copied, and many rows lie on disk.

    Args:
      array: [n, ...].
      index: numbers of rows, int.
    """
    if np.array_equal(index, np.arange(len(array))):
        return array
    found = zeros((len(index), *array.shape[1:]), array.dtype)
    return np.take(array, index, axis=0, out=found, mode="clip")


def write_file(path: epath.Path, content: str | bytes) -> None:
    """Writes a file, complete or not at all, and the folders above it.

    Raises:
      UserError: it cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    # Of several hosts, processes may have the same number.
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.part"
    try:
        with as_os_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {shown(path)}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError), as_os_errors():
            temporary.unlink(missing_ok=True)  # on a full disk it takes the room
