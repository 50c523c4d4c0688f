"""A communicator whose other ranks do what this one does: what an exchange makes a rank do."""

from typing import Any, NamedTuple

from hpc_dl.comm import Op
from hpc_dl.comm.base import BaseCommunicator
from hpc_dl.comm.kernels import combine
from hpc_dl.comm.protocol import Array


class Call(NamedTuple):
    """A collective."""

    name: str
    """``allreduce``, ``alltoall`` or ``allgather``."""
    nbytes: float
    """That this rank reduces, sends to the others together, or gives to all."""
    dtype: str


class Mirror(BaseCommunicator):
    """Sends nothing and takes no time; notes what would have been sent.

    Shards of what is exchanged must be equally large on all ranks.
    """

    name = "mirror"

    def __init__(self, size: int):
        super().__init__(rank=0, size=size, threaded=False)
        self.calls: list[Call] = []

    def _allreduce(self, flat: Array, op: Op, scale: float) -> None:
        self._note("allreduce", [flat])
        factor = round(scale * self.size, 9) if op is Op.SUM else scale
        if factor != 1:
            flat *= flat.dtype.type(factor)

    def _allreduce_device(self, x: Any, op: Op, scale: float) -> None:
        self._note("allreduce", [x])
        x *= scale * self.size if op is Op.SUM else scale

    def _allgather(self, x: Array) -> list[Array]:
        self._note("allgather", [x])
        return [x] * self.size

    def _alltoall(self, parts: list[Array]) -> list[Array]:
        self._note("alltoall", parts[1:])
        # What each of the others sends here is what this rank sends to one of them.
        return parts[:1] + parts[1:2] * (self.size - 1)

    def _exchange(self, row: Array) -> Array:
        return row[None].repeat(self.size, axis=0)

    def _reduce_parts(self, parts: list[Array], op: Op, scale: float) -> Array:
        return combine(parts, op, scale)

    def _broadcast(self, flat: Array, root: int) -> None:
        pass

    def _barrier(self) -> None:
        pass

    def check_device(self, x: Any) -> None:
        """Accept every tensor."""

    def split(self, color: int | None, key: int = 0) -> "Mirror | None":
        """Return a communicator of as many ranks, which all give the same color."""
        self._check_color(color)
        return None if color is None else Mirror(self.size)

    def _note(self, name: str, arrays: list[Any]) -> None:
        dtype = str(arrays[0].dtype).removeprefix("torch.") if arrays else ""
        self.calls.append(Call(name, sum(x.nbytes for x in arrays), dtype))
