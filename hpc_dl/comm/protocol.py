"""What a communicator is: collectives on host arrays, and messages where there are any."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hpc_dl.errors import OptionError

Array = NDArray[Any]


class Op(StrEnum):
    """How an all-reduce combines the values of the ranks."""

    SUM = "sum"
    AVERAGE = "average"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"
    ADASUM = "adasum"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise OptionError.unknown("op", value, [op.value for op in cls])


class Status(NamedTuple):
    """Where a message came from and how large it was."""

    source: int
    tag: int
    nbytes: int


#: Accept a message from any rank, or with any tag.
ANY = -1


class Work(Protocol):
    """A collective or a message under way."""

    def wait(self) -> Any:
        """Block until it is complete; return its result or raise its error."""

    def done(self) -> bool:
        """Tell whether ``wait`` would return at once."""


@runtime_checkable
class Communicator(Protocol):
    """Collectives over a group of ranks. All ranks call the same ones in the same order.

    Arrays are NumPy arrays in C order (or CUDA tensors where the communicator serves
    them). ``allreduce`` and ``broadcast`` work in place and refuse an array that is not
    contiguous; the others read their input, through a copy where it is not contiguous,
    and return new arrays.
    """

    name: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    homogeneous: bool
    negotiates: bool
    """Whether a mismatch between ranks is found by the communicator itself."""

    def allreduce(
        self, x: Array, op: Op = Op.SUM, scale: float = 1.0, name: str | None = None
    ) -> Array: ...
    def allreduce_async(
        self, x: Array, op: Op = Op.SUM, scale: float = 1.0, name: str | None = None
    ) -> Work: ...
    def persistent_allreduce(
        self, x: Array, op: Op = Op.SUM, scale: float = 1.0, name: str | None = None
    ) -> Callable[[], Work]: ...
    def allgather(self, x: Array) -> list[Array]: ...
    def allgather_async(self, x: Array) -> Work: ...
    def reduce_scatter(self, x: Array, op: Op = Op.SUM, scale: float = 1.0) -> Array: ...
    def reduce_scatter_async(self, x: Array, op: Op = Op.SUM, scale: float = 1.0) -> Work: ...
    def broadcast(self, x: Array, root: int = 0) -> Array: ...
    def broadcast_async(self, x: Array, root: int = 0) -> Work: ...
    def alltoall(self, parts: list[Array]) -> list[Array]: ...
    def alltoall_async(self, parts: list[Array]) -> Work: ...
    def exchange(self, row: Array) -> Array: ...
    def barrier(self) -> None: ...
    def split(self, color: int | None, key: int = 0) -> "Communicator | None": ...
    def run(self, call: Callable[[], Any]) -> Any: ...
    def submit(self, call: Callable[[], Any]) -> Work: ...
    def owns(self, x: Array) -> bool: ...
    def check_device(self, x: Any) -> None: ...
    def allocate(self, nbytes: int) -> NDArray[np.uint8]: ...
    def close(self) -> None: ...


@runtime_checkable
class PointToPoint(Communicator, Protocol):
    """Messages between two ranks; asynchronous strategies ask for it by this type."""

    def send(self, x: Array, dest: int, tag: int = 0) -> None: ...
    def recv(self, x: Array, source: int = ANY, tag: int = ANY) -> Status: ...
    def isend(self, x: Array, dest: int, tag: int = 0) -> Work: ...
    def irecv(self, x: Array, source: int = ANY, tag: int = ANY) -> Work: ...
    def iprobe(self, source: int = ANY, tag: int = ANY) -> Status | None: ...
