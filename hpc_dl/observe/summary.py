"""The one-page result of a run, written whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_dl.errors import DataError
from hpc_dl.observe.values import plain


def write_summary(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write ``values`` as JSON; a reader finds the old file or the new, never a part.

    Args:
        path: the file, for example ``summary.json``.
        values: numbers, strings, None, and mappings and lists of those.

    Raises:
        OptionError: a value that JSON cannot hold.
        DataError: the file cannot be written.
    """
    path = Path(path)
    text = json.dumps(plain(values), indent=2, allow_nan=False) + "\n"
    try:
        _replace(path, text.encode())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from error


def _replace(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o666 & ~_umask())
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    # The only way to read it is to set it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
