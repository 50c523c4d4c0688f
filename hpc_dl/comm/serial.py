"""One rank: every collective is the identity. For runs without a launcher."""

from hpc_dl.comm.base import BaseCommunicator
from hpc_dl.comm.kernels import combine, scale_in_place
from hpc_dl.comm.protocol import Array, Op


class SerialCommunicator(BaseCommunicator):
    """The communicator of a single process."""

    name = "serial"

    def __init__(self) -> None:
        super().__init__(rank=0, size=1, threaded=False)

    def _allreduce(self, flat: Array, op: Op, scale: float) -> None:
        scale_in_place(flat, scale)

    def _allgather(self, x: Array) -> list[Array]:
        return [x.copy()]

    def _broadcast(self, flat: Array, root: int) -> None:
        pass

    def _alltoall(self, parts: list[Array]) -> list[Array]:
        return [part.copy() for part in parts]

    def _exchange(self, row: Array) -> Array:
        return row.copy().reshape(1, -1)

    def _barrier(self) -> None:
        pass

    def _reduce_parts(self, parts: list[Array], op: Op, scale: float) -> Array:
        return combine(parts, op, scale)

    def split(self, color: int | None, key: int = 0) -> "SerialCommunicator | None":
        """Return a communicator of this one rank, or None without a color."""
        self._check_color(color)
        return None if color is None else SerialCommunicator()
