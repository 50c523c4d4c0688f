"""Horovod's collectives behind the protocol; NCCL or MPI rings, whatever it was built with.

Only plain collectives are used, never Horovod's optimizers. Horovod compares names and
shapes between ranks by itself and serves ranks that have joined, so callers need not.
"""

import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from hpc_dl.arrays import BFLOAT16, is_device_tensor
from hpc_dl.comm.base import BaseCommunicator
from hpc_dl.comm.choose import installed_horovod
from hpc_dl.comm.kernels import combine
from hpc_dl.comm.protocol import Array, Op, Work
from hpc_dl.errors import MismatchError, MissingComponentError, RanksJoinedError, UnsupportedError

BUILD = "build it with `hpc-dl horovod build`"


class Binding(Protocol):
    """Horovod's functions for one framework, on NumPy arrays (or CUDA tensors)."""

    hvd: Any
    reducible: frozenset[str]
    blocks: bool
    """Whether collectives are over when their call returns."""

    def allreduce_starter(
        self, x: Any, op: Op, scale: float, name: str, group: Any
    ) -> Callable[[], Any]: ...
    def broadcast_start(self, x: Any, root: int, name: str, group: Any) -> Any: ...
    def finish(self, handle: Any) -> None: ...
    def poll(self, handle: Any) -> bool: ...
    def allgather(self, x: Array, name: str, group: Any) -> Array: ...
    def alltoall(self, x: Array, rows: Array, name: str, group: Any) -> tuple[Array, Array]: ...
    def join(self) -> int: ...


class HorovodCommunicator(BaseCommunicator):
    """Collectives over Horovod; it has no messages between two ranks."""

    name = "horovod"
    negotiates = True
    has_adasum = True

    def __init__(self, binding: Binding, group: Any, ranks: list[int], label: str = "world"):
        """Wrap a process set.

        Args:
            binding: for the framework whose build of Horovod is used.
            group: Horovod's process set.
            ranks: the global ranks of the group, ascending.
            label: goes into the names of the collectives; the same on all its ranks.
        """
        self.hvd, self._binding = binding.hvd, binding
        super().__init__(ranks.index(self.hvd.rank()), len(ranks))
        self._group, self._ranks, self._label = group, ranks, label
        self._whole = len(ranks) == self.hvd.size()
        if self._whole:
            self.local_rank, self.local_size = self.hvd.local_rank(), self.hvd.local_size()
            self.cross_rank, self.cross_size = self.hvd.cross_rank(), self.hvd.cross_size()
        self._started, self._splits, self._joins = 0, 0, 0
        if self._whole:
            sizes = self._exchange(np.array([self.local_size], np.int64))
            self.homogeneous = bool(sizes.min() == sizes.max())

    @property
    def process_set(self) -> Any:
        """Horovod's process set of these ranks, for callers of Horovod's own operations."""
        return self._group

    def _name(self, what: str) -> str:
        # Calls in the queue come one after the other, so they can share a name, by which
        # Horovod and TensorFlow find again what they have prepared for it.
        return f"hpc_dl.{self._label}.{what}"

    def _resolve(self, x: Any, op: Op, scale: float, what: str) -> tuple[Op, float]:
        if op is Op.ADASUM and (not self._whole or self.size & (self.size - 1)):
            raise UnsupportedError(
                "Horovod's Adasum needs all ranks of the job and a power of two of them; got "
                f"{self.size} of {self.hvd.size()} ranks. Use op=Average"
            )
        return super()._resolve(x, op, scale, what)

    def _allreduce(self, flat: Array, op: Op, scale: float) -> None:
        if flat.size == 0:
            return
        if flat.dtype.name not in self._binding.reducible:
            self._allreduce_as(flat, op, scale)
            return
        name = self._name("allreduce")
        self._finish(self._binding.allreduce_starter(flat, op, scale, name, self._group)())

    def _allreduce_as(self, flat: Array, op: Op, scale: float) -> None:
        """Reduce a type that Horovod does not: bfloat16 as float32, others by a gather."""
        if flat.dtype == BFLOAT16:
            wide = flat.astype(np.float32)
            self._allreduce(wide, op, scale)
            flat[:] = wide.astype(BFLOAT16)
        else:
            flat[:] = combine(self._allgather(flat), op, scale)

    def allreduce(
        self, x: Array, op: Op = Op.SUM, scale: float = 1.0, name: str | None = None
    ) -> Array:
        """Combine ``x`` over all ranks, in place, and return it."""
        # Part of a call in the queue it needs no number, which may be another on each rank: the
        # caller's thread goes on and counts, too.
        if not self._is_started(x) or self._queue.is_here():
            return super().allreduce(x, op, scale, name)
        self.allreduce_async(x, op, scale, name).wait()
        return x

    def _is_started(self, x: Any) -> bool:
        """Tell whether Horovod's own thread reduces ``x``; else it is a call in the queue."""
        if self._binding.blocks or not (is_device_tensor(x) or isinstance(x, np.ndarray)):
            return False
        native = is_device_tensor(x) or x.dtype.name in self._binding.reducible
        return bool(native and np.prod(x.shape) != 0)

    def persistent_allreduce(
        self, x: Array, op: Op = Op.SUM, scale: float = 1.0, name: str | None = None
    ) -> Callable[[], Work]:
        """Return a function that starts ``allreduce`` in Horovod's own background thread."""
        if not self._is_started(x):
            return super().persistent_allreduce(x, op, scale)
        resolved, factor = self._resolve(x, Op(op), scale, "allreduce")
        flat = x if is_device_tensor(x) else self._flat(x, "allreduce")
        if name is None:
            self._started += 1
            name = f"async.{self._started}"
        label = f"hpc_dl.{self._label}.{name}"
        start = self._binding.allreduce_starter(flat, resolved, factor, label, self._group)
        return lambda: _HorovodWork(self, start(), x)

    def _allreduce_device(self, x: Any, op: Op, scale: float) -> None:
        name = self._name("allreduce")
        self._finish(self._binding.allreduce_starter(x, op, scale, name, self._group)())

    def check_device(self, x: Any) -> None:
        """Accept every tensor: Horovod takes it, or it is copied through the host."""

    def _broadcast(self, flat: Array, root: int) -> None:
        if flat.size:
            # Horovod knows few types; for a broadcast the bytes are enough.
            self._broadcast_device(flat.view(np.uint8), root)

    def _broadcast_device(self, x: Any, root: int) -> None:
        name = self._name("broadcast")
        self._finish(self._binding.broadcast_start(x, self._ranks[root], name, self._group))

    def _allgather(self, x: Array) -> list[Array]:
        shape = x.shape[1:] if x.ndim else ()
        row_bytes = x.itemsize * int(np.prod(shape))
        rows = self._exchange(np.array([len(x) if x.ndim else 1], np.int64)).ravel()
        if row_bytes == 0 or rows.sum() == 0:
            return [np.empty((int(n), *shape), x.dtype) for n in rows]
        sent = x.reshape(-1).view(np.uint8).reshape(-1, row_bytes)
        everyone = self._gather(sent, "allgather")
        whole = np.ascontiguousarray(everyone).reshape(-1).view(x.dtype).reshape(-1, *shape)
        arrays = np.split(whole, np.cumsum(rows)[:-1])
        return [array.reshape(()) for array in arrays] if x.ndim == 0 else arrays

    def _alltoall(self, parts: list[Array]) -> list[Array]:
        shape, dtype = parts[0].shape[1:], parts[0].dtype
        row_bytes = dtype.itemsize * int(np.prod(shape))
        rows = np.array([len(part) for part in parts], np.int32)
        table = self._exchange(rows)
        if row_bytes == 0 or table.sum() == 0:
            return [np.empty((int(n), *shape), dtype) for n in table[:, self.rank]]
        sent = np.concatenate(parts).reshape(-1).view(np.uint8).reshape(-1, row_bytes)
        name = self._name("alltoall")
        incoming, received = self._binding.alltoall(sent, rows, name, self._group)
        whole = np.ascontiguousarray(incoming).reshape(-1).view(dtype).reshape(-1, *shape)
        return np.split(whole, np.cumsum(received)[:-1])

    def _exchange(self, row: Array) -> Array:
        sent = row.view(np.uint8).reshape(1, -1)
        rows = self._gather(sent, "exchange")
        return np.ascontiguousarray(rows).reshape(-1).view(row.dtype).reshape(self.size, -1)

    def _gather(self, sent: Array, what: str) -> Array:
        try:
            return self._binding.allgather(sent, self._name(what), self._group)
        except Exception as error:
            if "not supported with Join" in str(error):
                raise RanksJoinedError(
                    "a rank has joined; over Horovod only all-reduce goes on after join(). Use "
                    "the communicator 'mpi', which also serves gathers"
                ) from error
            raise

    def _barrier(self) -> None:
        self._exchange(np.zeros(1, np.uint8))

    def _reduce_parts(self, parts: list[Array], op: Op, scale: float) -> Array:
        return combine(parts, op, scale)

    def _finish(self, handle: Any) -> None:
        try:
            self._binding.finish(handle)
        except Exception as error:
            text = str(error)
            if "Mismatched" in text or "mismatched" in text:
                raise MismatchError(f"ranks called different collectives: {text}") from error
            raise

    def join(self) -> int:
        """Serve the others' all-reduces with zeros until all ranks have joined."""
        last = self._binding.join()
        # Ranks have made different numbers of calls, and the numbers are in the names.
        self._joins += 1
        counts = np.array([[self._started]], np.int64).view(np.uint8)
        name = f"hpc_dl.{self._label}.joined.{self._joins}"
        table = self._binding.allgather(counts, name, self._group).view(np.int64)
        self._started = int(table.max())
        return last

    def split(self, color: int | None, key: int = 0) -> "HorovodCommunicator | None":
        """Form process sets of the ranks that give the same color, in the order of ranks.

        Raises:
            UnsupportedError: this is itself a part of the ranks (Horovod registers process
                sets with all ranks of the job), or keys ask for another order.
        """
        self._check_color(color)
        if not self._whole:
            raise UnsupportedError(
                "Horovod registers a process set with all ranks of the job, so a group of some "
                "of them cannot be split; split the communicator of all ranks"
            )
        table = self.exchange(np.array([color is not None, color or 0, key], np.int64))
        self._splits += 1
        mine: HorovodCommunicator | None = None
        for group_color in sorted({int(c) for there, c, _ in table if there}):
            ranks = [r for r, (there, c, _) in enumerate(table) if there and c == group_color]
            keys = [int(table[r][2]) for r in ranks]
            if keys != sorted(keys):
                raise UnsupportedError(
                    f"Horovod keeps the ranks of a process set in ascending order; got keys {keys} "
                    f"for ranks {ranks}. Leave the keys out, or use the communicator 'mpi'"
                )
            group = self._process_set(ranks)
            if color == group_color:
                label = f"split{self._splits}.{group_color}"
                mine = HorovodCommunicator(self._binding, group, ranks, label)
        return mine

    def _process_set(self, ranks: list[int]) -> Any:
        if len(ranks) == self.size:
            return self.hvd.global_process_set
        known = _process_sets.get(tuple(ranks))
        if known is None:
            known = _process_sets[tuple(ranks)] = self.hvd.add_process_set(ranks)
        return known


#: Horovod refuses to register the same ranks twice, and keeps sets until it shuts down.
_process_sets: dict[tuple[int, ...], Any] = {}


class _HorovodWork:
    """An all-reduce under way in Horovod's background thread."""

    def __init__(self, owner: HorovodCommunicator, handle: Any, x: Array):
        self._owner, self._handle, self._x = owner, handle, x
        self._finished = False

    def done(self) -> bool:
        """Tell whether ``wait`` would return at once."""
        return self._finished or self._owner._binding.poll(self._handle)

    def wait(self) -> Array:
        """Block until it is complete; return the reduced array."""
        if not self._finished:
            self._finished = True
            self._owner._finish(self._handle)
        return self._x


def make_horovod(framework: str | None) -> HorovodCommunicator:
    """Start Horovod and wrap all its ranks.

    Raises:
        MissingComponentError: it is not installed, or not built for the framework.
    """
    found = installed_horovod()
    if found is None or not found.frameworks:
        raise MissingComponentError(f"Horovod is not built here; {BUILD}")
    if framework is not None and framework not in found.frameworks:
        raise MissingComponentError(
            f"Horovod is built for {', '.join(sorted(found.frameworks))}, not for {framework}; "
            f"{BUILD} --framework {framework}"
        )
    os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
    binding: Binding
    if (framework or min(found.frameworks, key=lambda name: name != "torch")) == "torch":
        from hpc_dl.comm.horovod_torch import TorchBinding

        binding = TorchBinding()
    else:
        from hpc_dl.comm.horovod_tensorflow import TensorFlowBinding

        binding = TensorFlowBinding()
    if not binding.hvd.is_initialized():
        _process_sets.clear()
        binding.hvd.init()
    ranks = list(range(binding.hvd.size()))
    return HorovodCommunicator(binding, binding.hvd.global_process_set, ranks)
