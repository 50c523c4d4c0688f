"""Read out of a shared library where it looks for those that it needs."""

import struct

from hpc_dl.errors import BuildError

_LOAD, _DYNAMIC = 1, 2
_STRINGS, _RPATH, _RUNPATH = 5, 15, 29


def run_paths(library: bytes) -> list[str]:
    """Return the folders of a 64-bit library's RPATH and RUNPATH, in their order.

    Args:
        library: the content of the file.

    Raises:
        BuildError: this is no such library.
    """
    try:
        return _run_paths(library)
    except (struct.error, ValueError, StopIteration) as error:
        raise BuildError(f"a library that was built cannot be read: {error}") from error


def _run_paths(library: bytes) -> list[str]:
    if library[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    order = "<" if library[5] == 1 else ">"
    (table,) = struct.unpack_from(f"{order}Q", library, 32)
    size, count = struct.unpack_from(f"{order}HH", library, 54)
    # Each segment: type, flags, offset in the file, address, physical address, size in the file.
    segments = [
        struct.unpack_from(f"{order}IIQQQQ", library, table + number * size)
        for number in range(count)
    ]
    entries = [
        entry
        for kind, _, offset, _, _, length in segments
        if kind == _DYNAMIC
        for entry in struct.iter_unpack(f"{order}qQ", library[offset : offset + length])
    ]
    addresses = [value for tag, value in entries if tag == _STRINGS]
    if not addresses:
        return []
    strings = next(
        offset + addresses[0] - address
        for kind, _, offset, address, _, length in segments
        if kind == _LOAD and address <= addresses[0] < address + length
    )
    return [
        path
        for tag, value in entries
        if tag in (_RPATH, _RUNPATH)
        for path in _string(library, strings + value).split(":")
    ]


def _string(library: bytes, start: int) -> str:
    return library[start : library.index(b"\0", start)].decode(errors="surrogateescape")
