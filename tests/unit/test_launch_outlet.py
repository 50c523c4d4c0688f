"""A slow reader gets everything, and nobody has to wait for it."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from hpc_dl.launch.outlet import CAPACITY, Outlet

#: Far more than a pipe holds.
MUCH = b"0123456789abcdef" * (1 << 16)


@pytest.fixture
def pipe() -> Iterator[tuple[int, BinaryIO]]:
    """A pipe that nobody reads yet: (reading end, writing end)."""
    reading, writing = os.pipe()
    with open(writing, "wb", buffering=0) as stream:
        yield reading, stream  # type: ignore[misc]


def read(outlet: Outlet, descriptor: int, count: int) -> bytes:
    """Read so much from the other end, by turns with the outlet."""
    data = b""
    while len(data) < count:
        outlet.pump()
        data += os.read(descriptor, count - len(data))
    return data


def test_everything_arrives_in_order(pipe: tuple[int, BinaryIO]) -> None:
    reading, stream = pipe
    outlet = Outlet(stream)
    for start in range(0, len(MUCH), 1000):
        outlet.write(MUCH[start : start + 1000])
    assert read(outlet, reading, len(MUCH)) == MUCH
    assert outlet.close(None) == 0
    os.close(reading)


def test_nobody_waits_for_the_reader(pipe: tuple[int, BinaryIO]) -> None:
    reading, stream = pipe
    outlet = Outlet(stream)
    assert outlet.waiting_for is None
    outlet.write(MUCH)
    assert not outlet.full
    outlet.write(MUCH)
    assert outlet.full
    outlet.pump()
    assert outlet.full
    assert outlet.waiting_for == stream.fileno()
    assert len(read(outlet, reading, 2 * len(MUCH))) == 2 * len(MUCH)
    assert not outlet.full
    assert outlet.waiting_for is None
    os.close(reading)


def test_a_reader_that_never_reads_is_given_up(pipe: tuple[int, BinaryIO]) -> None:
    reading, stream = pipe
    outlet = Outlet(stream)
    outlet.write(MUCH)
    left = outlet.close(0.2)
    assert 0 < left < len(MUCH)
    os.close(reading)


def test_a_reader_that_has_gone_is_an_error(pipe: tuple[int, BinaryIO]) -> None:
    reading, stream = pipe
    os.close(reading)
    outlet = Outlet(stream)
    outlet.write(b"hello")
    with pytest.raises(BrokenPipeError):
        outlet.pump()
    with pytest.raises(BrokenPipeError):
        outlet.close(None)


def test_a_stream_that_somebody_made_non_blocking(pipe: tuple[int, BinaryIO]) -> None:
    reading, stream = pipe
    os.set_blocking(stream.fileno(), False)
    outlet = Outlet(stream)
    outlet.write(MUCH)
    assert read(outlet, reading, len(MUCH)) == MUCH
    assert outlet.close(None) == 0
    os.close(reading)


def test_a_file_takes_everything(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as stream:
        outlet = Outlet(stream)
        outlet.write(MUCH)
        outlet.pump()
        assert outlet.waiting_for is None
    assert (tmp_path / "log").read_bytes() == MUCH


def test_memory_is_written_at_once() -> None:
    stream = io.BytesIO()
    outlet = Outlet(stream)
    outlet.write(b"x" * (CAPACITY + 1))
    assert stream.tell() == CAPACITY + 1
    assert not outlet.full
    assert outlet.close(None) == 0
