"""What all communicators share: checks, in-place rules, order, and the watch for stalls.

A subclass provides the collectives on flat, contiguous host arrays (the methods with a
leading underscore); this class turns what callers pass into those.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hpc_dl.arrays import is_device_tensor
from hpc_dl.comm.numbers import check_number_type
from hpc_dl.comm.protocol import ANY, Array, Communicator, Op, Work
from hpc_dl.comm.queue import CommQueue
from hpc_dl.comm.stall import Watch
from hpc_dl.errors import OptionError, UnsupportedError

NO_ADASUM = (
    "Adasum is not available over the communicator {name!r}; valid ops: average, sum, min, max, "
    "product. Use op=Average, or the communicator 'horovod' (HPC_DL_COMM=horovod)"
)


class BaseCommunicator(ABC):
    """A communicator whose subclass knows only flat, contiguous host arrays."""

    name: str = "base"
    negotiates: bool = False
    has_adasum: ClassVar[bool] = False

    def __init__(self, rank: int, size: int, *, threaded: bool = True):
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = rank, size
        self.cross_rank, self.cross_size = 0, 1
        self.homogeneous = True
        self._queue = CommQueue(f"hpc_dl.{self.name}", threaded)
        self.watch = Watch(self.name, rank, size)

    # --- what a subclass provides -------------------------------------------------

    @abstractmethod
    def _allreduce(self, flat: Array, op: Op, scale: float) -> None:
        """Reduce the 1-D ``flat`` in place; ``op`` is never AVERAGE."""

    @abstractmethod
    def _allgather(self, x: Array) -> list[Array]:
        """Return every rank's array, by rank; the lengths of dimension 0 may differ."""

    @abstractmethod
    def _broadcast(self, flat: Array, root: int) -> None:
        """Overwrite the 1-D ``flat`` with that of rank ``root``."""

    @abstractmethod
    def _alltoall(self, parts: list[Array]) -> list[Array]:
        """Send ``parts[i]`` to rank ``i``; return what came, by source rank."""

    @abstractmethod
    def _exchange(self, row: Array) -> Array:
        """Gather equal-sized 1-D rows into an array of shape (size, len(row))."""

    @abstractmethod
    def _barrier(self) -> None:
        """Wait for all ranks."""

    @abstractmethod
    def _reduce_parts(self, parts: list[Array], op: Op, scale: float) -> Array:
        """Combine the parts that came from each rank, in rank order, into a new array."""

    def _allreduce_device(self, x: Any, op: Op, scale: float) -> None:
        """Reduce a CUDA tensor in place, where the communicator can."""
        raise UnsupportedError(self._no_device(x))

    def _broadcast_device(self, x: Any, root: int) -> None:
        """Broadcast a CUDA tensor in place, where the communicator can."""
        raise UnsupportedError(self._no_device(x))

    # --- what callers use ---------------------------------------------------------

    def allreduce(
        self, x: Array, op: Op = Op.SUM, scale: float = 1.0, name: str | None = None
    ) -> Array:
        """Combine ``x`` over all ranks, in place, and return it.

        Args:
            x: any shape, contiguous. All ranks pass the same shape and type.
            op: AVERAGE divides the sum by the number of ranks; it needs a float type.
            scale: a factor on the result of SUM and AVERAGE, applied in the same pass.
            name: by which Horovod matches the calls of the ranks, in whatever order they
                come; the other communicators match calls by their order.

        Raises:
            UnsupportedError: not contiguous, or a type the op is not defined for.
        """
        self._queue.run(self._allreduce_call(x, op, scale))
        return x

    def allreduce_async(
        self, x: Array, op: Op = Op.SUM, scale: float = 1.0, name: str | None = None
    ) -> Work:
        """Start ``allreduce``; ``x`` is not to be touched until ``wait`` returns it."""
        return self.persistent_allreduce(x, op, scale, name)()

    def persistent_allreduce(
        self, x: Array, op: Op = Op.SUM, scale: float = 1.0, name: str | None = None
    ) -> Callable[[], Work]:
        """Return a function that starts ``allreduce`` of ``x``, as often as it is called.

        The arguments are checked here, once; a start costs as little as it can.
        """
        call = self._allreduce_call(x, op, scale)

        def run() -> Array:
            call()
            return x

        return lambda: self._queue.submit(run)

    def _allreduce_call(self, x: Array, op: Op, scale: float) -> Callable[[], None]:
        op, scale = self._resolve(x, Op(op), scale, "allreduce")
        if is_device_tensor(x):
            return self._watched("allreduce", x, lambda: self._allreduce_device(x, op, scale))
        flat = self._flat(x, "allreduce")
        return self._watched("allreduce", x, lambda: self._allreduce(flat, op, scale))

    def allgather(self, x: Array) -> list[Array]:
        """Return every rank's ``x``, by rank. Dimension 0 may differ, the others must not."""
        result: list[Array] = self._queue.run(self._allgather_call(x))
        return result

    def allgather_async(self, x: Array) -> Work:
        """Start ``allgather``."""
        return self._queue.submit(self._allgather_call(x))

    def _allgather_call(self, x: Array) -> Callable[[], list[Array]]:
        x = self._readable(x, "allgather")
        return self._watched("allgather", x, lambda: self._allgather(x))

    def broadcast(self, x: Array, root: int = 0) -> Array:
        """Overwrite ``x``, in place, with that of rank ``root``, and return it."""
        self._queue.run(self._broadcast_call(x, root))
        return x

    def broadcast_async(self, x: Array, root: int = 0) -> Work:
        """Start ``broadcast``; ``x`` is not to be touched until ``wait`` returns it."""
        call = self._broadcast_call(x, root)

        def run() -> Array:
            call()
            return x

        return self._queue.submit(run)

    def _broadcast_call(self, x: Array, root: int) -> Callable[[], None]:
        self._check_rank(root, "root")
        if is_device_tensor(x):
            return self._watched("broadcast", x, lambda: self._broadcast_device(x, root))
        flat = self._flat(x, "broadcast")
        return self._watched("broadcast", x, lambda: self._broadcast(flat, root))

    def alltoall(self, parts: list[Array]) -> list[Array]:
        """Send ``parts[i]`` to rank ``i`` and return what came, by source rank.

        Parts may differ in dimension 0, not in the others.
        """
        result: list[Array] = self._queue.run(self._alltoall_call(parts))
        return result

    def alltoall_async(self, parts: list[Array]) -> Work:
        """Start ``alltoall``."""
        return self._queue.submit(self._alltoall_call(parts))

    def _alltoall_call(self, parts: list[Array]) -> Callable[[], list[Array]]:
        if len(parts) != self.size:
            raise OptionError(
                f"alltoall was given {len(parts)} parts; give one for each of the "
                f"{self.size} ranks (an empty array where there is nothing to send)"
            )
        ready = [self._readable(part, "alltoall") for part in parts]
        kinds = [f"({', '.join(map(str, ('any', *p.shape[1:])))}) {p.dtype}" for p in ready]
        if len(set(kinds)) > 1 or min(part.ndim for part in ready) == 0:
            raise UnsupportedError(
                "alltoall sends rows: parts have one dimension or more, may differ in dimension 0, "
                f"and are alike otherwise; got shapes {[part.shape for part in ready]} of types "
                f"{', '.join(dict.fromkeys(str(part.dtype) for part in ready))}"
            )
        return self._watched("alltoall", ready[0], lambda: self._alltoall(ready))

    def reduce_scatter(self, x: Array, op: Op = Op.SUM, scale: float = 1.0) -> Array:
        """Combine ``x`` over all ranks and return this rank's share along dimension 0.

        Rank ``r`` gets the ``r``-th of ``size`` nearly equal parts; the first
        ``len(x) % size`` ranks get one row more.
        """
        result: Array = self._queue.run(self._reduce_scatter_call(x, op, scale))
        return result

    def reduce_scatter_async(self, x: Array, op: Op = Op.SUM, scale: float = 1.0) -> Work:
        """Start ``reduce_scatter``."""
        return self._queue.submit(self._reduce_scatter_call(x, op, scale))

    def _reduce_scatter_call(self, x: Array, op: Op, scale: float) -> Callable[[], Array]:
        if Op(op) is Op.ADASUM:
            raise UnsupportedError("reduce_scatter has no Adasum; use allreduce(op=Adasum)")
        op, scale = self._resolve(x, Op(op), scale, "reduce_scatter")
        x = self._readable(x, "reduce_scatter")
        if x.ndim == 0:
            raise UnsupportedError("reduce_scatter needs at least one dimension; got a scalar")
        parts = np.array_split(x, self.size)

        def run() -> Array:
            return self._reduce_parts(self._alltoall(parts), op, scale)

        return self._watched("reduce_scatter", x, run)

    def exchange(self, row: Array) -> Array:
        """Gather rows of equal length into an array of shape (size, len(row))."""
        row = np.ascontiguousarray(row).reshape(-1)
        result: Array = self._queue.run(self._watched("exchange", row, lambda: self._exchange(row)))
        return result

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        empty = np.empty(0, np.uint8)
        self._queue.run(self._watched("barrier", empty, self._barrier))

    def run(self, call: Callable[[], Any]) -> Any:
        """Make ``call``, which may use this communicator, after all that was started before."""
        return self._queue.run(call)

    def submit(self, call: Callable[[], Any]) -> Work:
        """Start ``call``, which may use this communicator, in the order of the collectives."""
        return self._queue.submit(call)

    def owns(self, x: Array) -> bool:
        """Tell whether ``x`` lies in memory from ``allocate``.

        Such memory has a path of its own, so all ranks must pass it alike.
        """
        return False

    def check_device(self, x: Any) -> None:
        """Refuse a CUDA tensor, unless it may be copied through the host."""
        raise UnsupportedError(self._no_device(x))

    @abstractmethod
    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """Form sub-groups of the ranks that give the same color, ordered by key, then rank."""

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        """Return zeroed memory in which ``allreduce`` is fastest. All ranks call it alike."""
        return np.zeros(nbytes, np.uint8)

    def quiesce(self) -> None:
        """Wait for what was started on the communication thread, and end that thread."""
        self._queue.close()
        self.watch.close()

    def close(self) -> None:
        """Finish what is pending and free what was allocated. All ranks call it."""
        self.quiesce()

    # --- checks -------------------------------------------------------------------

    def _resolve(self, x: Array, op: Op, scale: float, what: str) -> tuple[Op, float]:
        """Check op and scale against the type of ``x``; turn AVERAGE into a scaled SUM."""
        if op is Op.ADASUM and not self.has_adasum and self.size > 1:
            raise UnsupportedError(NO_ADASUM.format(name=self.name))
        if is_device_tensor(x):
            dtype: Any = x.dtype
            real = bool(dtype.is_floating_point or dtype.is_complex)
        else:
            self._check_array(x, what)
            real = check_number_type(x.dtype, op)
        if op is Op.ADASUM and self.size == 1:
            return Op.SUM, scale
        if op is Op.AVERAGE:
            if not real:
                raise UnsupportedError(
                    f"the average of {x.dtype} is not a {x.dtype}; use op=Sum and divide, "
                    "or pass a float type"
                )
            return Op.SUM, scale / self.size
        if scale != 1.0 and (op in (Op.MIN, Op.MAX, Op.PRODUCT) or not real):
            raise UnsupportedError(
                f"a scale factor ({scale}) goes with the ops sum and average on float types, "
                f"not with {op.value} on {x.dtype}"
            )
        return op, scale

    def _check_array(self, x: Array, what: str) -> None:
        if not isinstance(x, np.ndarray):
            raise UnsupportedError(
                f"{what} over {self.name!r} takes NumPy arrays; got {type(x).__name__}. "
                "hpc_dl.arrays.host_view gives the array of a torch or TensorFlow tensor"
            )
        if x.dtype.hasobject:
            raise UnsupportedError(
                f"{what} moves the bytes of an array, and one of type object holds addresses; use "
                "hpc_dl.torch.allgather_object or broadcast_object"
            )

    def _flat(self, x: Array, what: str) -> Array:
        self._check_array(x, what)
        if not x.flags.c_contiguous:
            raise UnsupportedError(
                f"{what} works in place and needs a contiguous array; got strides {x.strides} "
                f"for shape {x.shape}. Pass numpy.ascontiguousarray(x) and use its result"
            )
        if not x.flags.writeable:
            raise UnsupportedError(f"{what} works in place; got a read-only array. Pass a copy")
        return x.reshape(-1)

    def _readable(self, x: Array, what: str) -> Array:
        if is_device_tensor(x):
            raise UnsupportedError(self._no_device(x, what))
        self._check_array(x, what)
        return x if x.flags.c_contiguous else np.ascontiguousarray(x)

    def _no_device(self, x: Any, what: str = "this collective") -> str:
        return (
            f"{what} over {self.name!r} cannot take a tensor on {x.device}; use the "
            "communicator 'horovod' built with NCCL (hpc-dl horovod build --gpu nccl), a "
            "CUDA-aware MPI (mpi:cuda=aware), or let it be copied through the host (mpi:cuda=stage)"
        )

    def _check_rank(self, rank: int, what: str) -> None:
        if not 0 <= rank < self.size:
            raise OptionError(f"{what} {rank} is no rank of this group; valid: 0..{self.size - 1}")

    def _check_address(self, rank: int, what: str, tag: int) -> None:
        wild = what == "source"
        if not (wild and rank == ANY):
            self._check_rank(rank, what)
        if tag < 0 and not (wild and tag == ANY):
            raise OptionError(f"tag {tag} of a message; valid: 0 or more")

    def _check_color(self, color: int | None) -> None:
        if color is not None and color < 0:
            raise OptionError(f"split: color {color}; valid: 0 or more, or None to stay outside")

    def _watched(self, what: str, x: Array, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            self.watch.begin(what, x)
            try:
                return call()
            finally:
                self.watch.end()

        return run
