"""Keep metrics as JSON lines that survive a crash."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hpc_dl.errors import DataError
from hpc_dl.observe.values import plain


class MetricsWriter:
    """Appends one JSON object a line to a file.

    A line reaches the operating system in one write, so it is there when the process dies. If
    the machine dies in the middle of a line, what is left of it is cut off at the next start.

    >>> with MetricsWriter("metrics.jsonl") as metrics:  # doctest: +SKIP
    ...     metrics.write({"epoch": 1, "loss": 0.25})
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Open ``path`` to append to it.

        Raises:
            DataError: it cannot be opened.
        """
        self.path = Path(path)
        try:
            self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise DataError(f"{path}: cannot be opened to append ({error.strerror})") from error
        self._cut_torn_line()

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line; NaN and infinities become null.

        Raises:
            OptionError: a value that JSON cannot hold.
        """
        line = json.dumps(plain(values), allow_nan=False)
        self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        """Make sure that all lines are on the disk, and close the file; again does nothing."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _cut_torn_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        content, start = b"", end
        while start and b"\n" not in content:
            begin = max(0, start - 4096)
            self._file.seek(begin)
            content, start = self._file.read(start - begin), begin
        self._file.truncate(start + content.rfind(b"\n") + 1)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the lines that a `MetricsWriter` wrote; an unfinished last line is left out.

    Raises:
        DataError: it cannot be read, or a line is no JSON object; names the line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found {line[:40]!r}")
        records.append(record)
    return records
