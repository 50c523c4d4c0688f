"""Plain MPI: reduction on a shared window inside a node, a ring between nodes.

Inside a node the ranks' buffers lie in one shared window. Each rank reduces its share of
all of them in place, chunk by chunk in cache, so that an all-reduce moves hardly more bytes
than one copy. Only the reduced shares travel between nodes: local_size times less than if
every rank sent its own buffer.
"""

import weakref
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hpc_dl.arrays import HALF_TYPES, host_view
from hpc_dl.comm import ring, rows, window
from hpc_dl.comm.base import BaseCommunicator
from hpc_dl.comm.cuda import CudaMode, choose_cuda_mode
from hpc_dl.comm.kernels import combine, reduce_in_place, scale_in_place, share
from hpc_dl.comm.mpi_message import MpiMessage, read_status, receive, wildcards
from hpc_dl.comm.node_barrier import CACHE_LINE, NodeBarrier
from hpc_dl.comm.protocol import ANY, Array, Op, Status, Work
from hpc_dl.comm.small import SmallSums
from hpc_dl.comm.stall import Arrivals
from hpc_dl.errors import OptionError

#: Up to this sharing the work between the ranks does not pay.
SMALL_BYTES = 64 * 1024
#: Below this MPI's own all-reduce takes less than the Python code of any other.
SMALLEST_BYTES = 8 * 1024
#: Bytes of each rank's staging area for buffers that are not in a window: small inside a
#: node, where it should stay in cache; larger between nodes, where each piece has a latency.
STAGE_BYTES = 1 << 20
STAGE_BYTES_BETWEEN_NODES = 16 << 20

#: What takes the short way while it is small: float32, float64; sums.
_QUICK_TYPES = frozenset({np.dtype(np.float32), np.dtype(np.float64)})
# Looking an op up by its name in the enumeration takes as long as the other checks together.
_SUM, _AVERAGE, _IN_PLACE, _MPI_SUM = Op.SUM, Op.AVERAGE, MPI.IN_PLACE, MPI.SUM

_MPI_OPS = {Op.SUM: MPI.SUM, Op.MIN: MPI.MIN, Op.MAX: MPI.MAX, Op.PRODUCT: MPI.PROD}


class MpiCommunicator(BaseCommunicator):
    """Collectives and messages over an MPI communicator."""

    name = "mpi"

    def __init__(self, comm: MPI.Intracomm, node_size: int = 0, cuda: str = "auto"):
        """Take over a communicator; all its ranks call this.

        Args:
            comm: any intra-communicator; it is duplicated.
            node_size: treat each run of so many ranks of a node as a node of its own (for
                NUMA domains, and to try the path between nodes on one machine); 0: real nodes.
            cuda: what to do with CUDA tensors: ``aware`` passes them to a CUDA-aware MPI,
                ``stage`` copies them through the host, ``error`` refuses them, ``auto`` is
                ``aware`` if MPI says that it is, else ``error``.
        """
        if not isinstance(node_size, int) or node_size < 0:
            raise OptionError(f"node_size={node_size}; valid: 0 (real nodes) or a positive number")
        threaded = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        super().__init__(comm.rank, comm.size, threaded=threaded)
        self.cuda = choose_cuda_mode(cuda)
        self._node_size = node_size
        self._comm = comm.Dup()
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
        if node_size:
            whole, node = node, node.Split(node.rank // node_size, node.rank)
            whole.Free()
        self._node = MPI.Intracomm(node)
        self._cross = self._comm.Split(node.rank, comm.rank)
        self.local_rank, self.local_size = node.rank, node.size
        self.cross_rank, self.cross_size = self._cross.rank, self._cross.size
        sizes = self._exchange(np.array([node.size], np.int64))
        self.homogeneous = bool(sizes.min() == sizes.max())
        # Every node cuts a buffer into the same shares, one for each of its first ranks.
        self._shares = int(sizes.min())
        self._alone = bool(sizes.max() == 1)
        self._one_node = bool(sizes.min() == comm.size)
        # For the messages of collectives between nodes, which must not meet those of the user.
        self._pairs = None if self._one_node else self._comm.Dup()
        self._barrier_of_node = NodeBarrier(self._node)
        self._small = (
            SmallSums(self._node, self._barrier_of_node, SMALL_BYTES)
            if self._one_node and self.size > 1
            else None
        )
        self._watch_node()
        # By the number of the allocation; without those whose memory nobody refers to.
        self._segments: dict[int, window.Segment] = {}
        self._allocations = 0
        self._stage: window.Segment | None = None

    def _watch_node(self) -> None:
        """Let the watch for stalls see which ranks of this node are late."""
        self.watch.elsewhere = not self._one_node
        if self.local_size > 1:
            ranks = np.empty(self.local_size, np.int64)
            self._node.Allgather(np.array([self.rank], np.int64), ranks)
            segment = window.allocate(self._node, CACHE_LINE)
            counters = [part.data.cast("q") for part in segment.parts]
            self.watch.arrivals = Arrivals(counters, ranks.tolist(), self.local_rank)

    # --- all-reduce ---------------------------------------------------------------

    def allreduce(
        self, x: Array, op: Op = Op.SUM, scale: float = 1.0, name: str | None = None
    ) -> Array:
        """Combine ``x`` over all ranks, in place, and return it; see the base class.

        A small array of a common type takes a short way: the checks for all the other cases
        would take as long as the reduction.
        """
        if (
            type(x) is np.ndarray
            and x.dtype in _QUICK_TYPES
            and 0 < x.nbytes <= SMALL_BYTES
            and x.flags.carray
            and (op is _SUM or op is _AVERAGE)
            and self._queue.idle()
        ):
            self.watch.begin("allreduce", x)
            try:
                with self._queue.running:
                    self._quick_sum(x)
            finally:
                self.watch.end()
            if op is _AVERAGE:
                scale /= self.size
            if abs(scale) > 1.0:
                scale_in_place(x.reshape(-1), scale)
            elif scale != 1.0:
                np.multiply(x, x.dtype.type(scale), out=x)  # which cannot overflow
            return x
        return super().allreduce(x, op, scale, name)

    def _quick_sum(self, x: Array) -> None:
        """Sum up to SMALL_BYTES of float32 or float64, whichever way the call came: what one
        rank calls at once may have to wait for its turn on another."""
        if self._small is None or x.nbytes < SMALLEST_BYTES:
            self._comm.Allreduce(_IN_PLACE, x, _MPI_SUM)
        else:
            self._small.sum(x)

    def _allreduce(self, flat: Array, op: Op, scale: float) -> None:
        if self.size == 1 or flat.size == 0:
            scale_in_place(flat, scale)
        elif flat.nbytes <= SMALL_BYTES and op is _SUM and flat.dtype in _QUICK_TYPES:
            self._quick_sum(flat)
            scale_in_place(flat, scale)
        elif flat.nbytes <= SMALL_BYTES and _mpi_reduces(flat, op):
            self._comm.Allreduce(MPI.IN_PLACE, flat, _MPI_OPS[op])
            scale_in_place(flat, scale)
        elif self._alone:
            ring.allreduce(self._cross, flat, op, scale)
        elif (views := self._window_views(flat)) is not None:
            self._barrier_of_node.wait()
            self._reduce_views(views, op, scale)
            self._barrier_of_node.wait()
        else:
            self._allreduce_staged(flat, op, scale)

    def _window_views(self, flat: Array) -> list[Array] | None:
        for segment in list(self._segments.values()):  # another thread may let go of one
            views = segment.views(flat)
            if views is not None:
                return views
        return None

    def _reduce_views(self, views: list[Array], op: Op, scale: float) -> None:
        """Reduce this rank's share of all local buffers, over all nodes, in place."""
        if self.local_rank >= self._shares:
            return
        lo, hi = share(
            len(views[0]), self.local_rank, self._shares, CACHE_LINE // views[0].itemsize
        )
        if self._one_node:
            reduce_in_place(views, lo, hi, op, scale)
            return
        # The sum of a node goes on as 16 bits where the type has so many: scale it first,
        # so that an average cannot overflow.
        half = views[0].dtype in HALF_TYPES
        before, after = (scale, 1.0) if half else (1.0, scale)
        reduce_in_place(views, lo, hi, op, before, out=views[:1])
        if hi > lo:
            ring.allreduce(self._cross, views[0][lo:hi], op)
        reduce_in_place(views[:1], lo, hi, op, after, out=views)

    def _allreduce_staged(self, flat: Array, op: Op, scale: float) -> None:
        """Pass a buffer that is not in a window through one, two slots in turn.

        While slot A is being reduced the next piece is copied into slot B, so one barrier
        for each piece is enough.
        """
        stage_bytes = STAGE_BYTES if self._one_node else STAGE_BYTES_BETWEEN_NODES
        if self._stage is None:
            self._stage = window.allocate(self._node, 2 * stage_bytes)
        step = stage_bytes // flat.itemsize
        pieces = [flat[start : start + step] for start in range(0, len(flat), step)]
        slots = [
            [part[at : at + stage_bytes].view(flat.dtype) for part in self._stage.parts]
            for at in (0, stage_bytes)
        ]
        mine = [slot[self.local_rank] for slot in slots]
        mine[0][: len(pieces[0])] = pieces[0]
        for number, piece in enumerate(pieces):
            self._barrier_of_node.wait()
            if number > 0:
                before = pieces[number - 1]
                np.copyto(before, mine[(number - 1) % 2][: len(before)])
            self._reduce_views([part[: len(piece)] for part in slots[number % 2]], op, scale)
            if number + 1 < len(pieces):
                after = pieces[number + 1]
                mine[(number + 1) % 2][: len(after)] = after
        self._barrier_of_node.wait()
        np.copyto(pieces[-1], mine[(len(pieces) - 1) % 2][: len(pieces[-1])])

    def _allreduce_device(self, x: Any, op: Op, scale: float) -> None:
        if self.cuda is CudaMode.ERROR:
            super()._allreduce_device(x, op, scale)
            return
        # This may be the communication thread, whose streams are not those of the caller.
        _wait_for_device(x)
        if self.cuda is CudaMode.STAGE or x.dtype.itemsize == 2:  # MPI has no 16-bit floats
            host = x.detach().cpu().contiguous()
            self._allreduce(host_view(host).reshape(-1), op, scale)
            x.copy_(host)
        else:
            self._comm.Allreduce(MPI.IN_PLACE, x, _MPI_OPS[op])
            if scale != 1.0:
                x.mul_(scale)
        _wait_for_device(x)

    def check_device(self, x: Any) -> None:
        """Refuse a CUDA tensor, unless it may be copied through the host."""
        if self.cuda is CudaMode.ERROR:
            super().check_device(x)

    # --- the other collectives ----------------------------------------------------

    def _allgather(self, x: Array) -> list[Array]:
        counts = self._exchange(np.array([len(x) if x.ndim else 1], np.int64)).ravel()
        arrays = rows.allgather(self._comm, self._pairs, x, counts)
        return [array.reshape(()) for array in arrays] if x.ndim == 0 else arrays

    def _broadcast(self, flat: Array, root: int) -> None:
        with rows.RowType(flat.itemsize) as item:
            self._comm.Bcast([flat, len(flat), item], root)

    def _broadcast_device(self, x: Any, root: int) -> None:
        if self.cuda is CudaMode.ERROR:
            super()._broadcast_device(x, root)
        elif self.cuda is CudaMode.STAGE:
            host = x.detach().cpu().contiguous()
            self._broadcast(host_view(host).reshape(-1), root)
            x.copy_(host)
        else:
            _wait_for_device(x)
            self._comm.Bcast(x, root)
            _wait_for_device(x)

    def _alltoall(self, parts: list[Array]) -> list[Array]:
        sent = np.array([len(part) for part in parts], np.int64)
        received = np.empty_like(sent)
        self._comm.Alltoall(sent, received)
        return rows.alltoall(self._comm, self._pairs, parts, received)

    def _exchange(self, row: Array) -> Array:
        table = np.empty((self.size, len(row)), row.dtype)
        self._comm.Allgather([row, row.nbytes, MPI.BYTE], [table, row.nbytes, MPI.BYTE])
        return table

    def _barrier(self) -> None:
        self._comm.Barrier()

    def _reduce_parts(self, parts: list[Array], op: Op, scale: float) -> Array:
        return combine(parts, op, scale)

    # --- groups and memory --------------------------------------------------------

    def split(self, color: int | None, key: int = 0) -> "MpiCommunicator | None":
        """Form sub-groups of the ranks that give the same color, ordered by key, then rank."""
        self._check_color(color)
        mpi_color = MPI.UNDEFINED if color is None else color
        part = MPI.Intracomm(self._queue.run(lambda: self._comm.Split(mpi_color, key)))
        if part == MPI.COMM_NULL:
            return None
        group = MpiCommunicator(part, self._node_size, self.cuda.value)
        part.Free()
        return group

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        """Return zeroed memory in the node's shared window. All ranks call it alike.

        It goes with the last reference to it.
        """
        if nbytes == 0 or self._alone:
            return np.zeros(nbytes, np.uint8)
        segment: window.Segment = self._queue.run(lambda: window.allocate(self._node, nbytes))
        memory = segment.own()
        self._allocations += 1
        self._segments[self._allocations] = segment
        weakref.finalize(memory, self._segments.pop, self._allocations, None)
        return memory

    def owns(self, x: Array) -> bool:
        """Tell whether ``x`` lies in a shared window."""
        return self._window_views(x) is not None

    def close(self) -> None:
        """Finish what is pending and free communicators. All ranks call it.

        Memory from ``allocate`` stays as long as the caller refers to it.
        """
        super().close()
        if self._comm == MPI.COMM_NULL:
            return
        self._segments.clear()
        self._stage = None
        for comm in (self._pairs, self._cross, self._node, self._comm):
            if comm is not None:
                comm.Free()

    # --- messages -----------------------------------------------------------------

    def send(self, x: Array, dest: int, tag: int = 0) -> None:
        """Send ``x``; returns when its memory may be reused."""
        self.isend(x, dest, tag).wait()

    def recv(self, x: Array, source: int = ANY, tag: int = ANY) -> Status:
        """Wait for a message and write it to the front of ``x``."""
        self._check_address(source, "source", tag)
        return receive(self._comm, self._flat(x, "recv"), source, tag)

    def isend(self, x: Array, dest: int, tag: int = 0) -> Work:
        """Start to send ``x``, which is not to be written to until ``wait`` returns."""
        self._check_address(dest, "dest", tag)
        flat = self._readable(x, "isend").reshape(-1)
        return MpiMessage(self._comm.Isend([flat, flat.nbytes, MPI.BYTE], dest, tag), flat)

    def irecv(self, x: Array, source: int = ANY, tag: int = ANY) -> Work:
        """Start to receive into ``x``, which must have room for the message.

        Where the size is not known ask ``iprobe``, or use ``recv``, which looks first: MPI
        notices too late that a message is longer.
        """
        self._check_address(source, "source", tag)
        flat = self._flat(x, "irecv")
        buffer = [flat, flat.nbytes, MPI.BYTE]
        return MpiMessage(self._comm.Irecv(buffer, *wildcards(source, tag)), flat)

    def iprobe(self, source: int = ANY, tag: int = ANY) -> Status | None:
        """Describe a message that ``recv`` would return at once, if there is one."""
        self._check_address(source, "source", tag)
        status = MPI.Status()
        found = self._comm.Iprobe(*wildcards(source, tag), status)
        return read_status(status) if found else None


def _mpi_reduces(flat: Array, op: Op) -> bool:
    """Tell whether MPI's own all-reduce serves: it has no 16-bit floats, and takes the
    smaller of a number and NaN as it comes, on each rank another."""
    integer = flat.dtype.kind in "iu"
    return integer or (op in (Op.SUM, Op.PRODUCT) and flat.dtype.kind in "fc" and flat.itemsize > 2)


def _wait_for_device(x: Any) -> None:
    """Make sure that the kernels that use ``x`` have ended: MPI knows no streams."""
    import torch

    torch.cuda.synchronize(x.device)
