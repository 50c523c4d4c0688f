"""A group of ranks that agree on each call before they make it.

Each rank contributes the hash of a description of its call. Where all agree the call is
made; where they differ, all ranks raise an error that names both; where some have joined
(run out of batches), those take part with nothing or zeros.

A communicator that compares calls itself (Horovod) is called directly.
"""

import json
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import ml_dtypes  # noqa: F401  (registers bfloat16 by name)
import numpy as np
import xxhash

from hpc_dl.comm import Communicator, Op, Work
from hpc_dl.comm.protocol import Array
from hpc_dl.errors import MismatchError, RanksJoinedError

_CALLS, _JOINED = 1, 2

#: What ranks that have joined take part in.
_SERVED = frozenset({"allreduce", "reduce", "allgather", "alltoall", "barrier", "present"})


class Call(NamedTuple):
    """What a rank is about to do: everything that must be equal on all ranks."""

    what: str
    name: str
    shape: tuple[int | None, ...] = ()
    """None where ranks may differ."""
    dtype: str = ""
    op: str = ""
    scale: float = 1.0
    root: int = 0
    state: str = ""
    """Where a reducer's compression stands."""

    def describe(self) -> str:
        """Say it in words."""
        parts = [f"{self.what} {self.name!r}"]
        if self.dtype:
            shape = ", ".join("any" if n is None else str(n) for n in self.shape)
            parts.append(f"shape ({shape}) {self.dtype}")
        if self.op:
            parts.append(f"op {self.op}" + (f" scale {self.scale:g}" if self.scale != 1 else ""))
        if self.what == "broadcast":
            parts.append(f"root {self.root}")
        if self.state:
            parts.append(f"compression at {self.state}")
        return ", ".join(parts)


class Served(Protocol):
    """What a rank that has joined takes part in; a ``Reducer`` is one."""

    def serve(self) -> None:
        """Take part in the reduction of the next bucket with zeros."""


class Group:
    """A communicator, the calls made on it, and the ranks that have joined."""

    def __init__(self, comm: Communicator):
        self.comm = comm
        self._counts: dict[str, int] = {}
        # Their optimizers own them; one that is gone must not keep its buckets.
        self._reducers: weakref.WeakValueDictionary[str, Served] = weakref.WeakValueDictionary()
        self.kept: dict[Any, Any] = {}
        """What adapters keep as long as this group."""
        self._joined_before: set[int] = set()

    def name(self, what: str, given: str | None) -> str:
        """Return the caller's name for a call, or one that counts calls of that kind."""
        if given is not None:
            return given
        self._counts[what] = self._counts.get(what, 0) + 1
        return f"{what}.noname.{self._counts[what]}"

    def run(self, call: Call, make: Callable[[], Any]) -> Any:
        """Agree on ``call``, then ``make`` it; return its result."""
        return self.comm.run(lambda: self._agreed(call, make))

    def start(self, call: Call, make: Callable[[], Any]) -> Work:
        """Like ``run`` on the communication thread."""
        return self.comm.submit(lambda: self._agreed(call, make))

    def agree(self, call: Call) -> bool:
        """Make sure that all ranks are about to make ``call``.

        Returns:
            False if some have joined, who take part as ``join`` says.

        Raises:
            MismatchError: on all ranks, naming two calls that differ.
            RanksJoinedError: on all ranks: those that have joined cannot serve the call.
        """
        if self.comm.negotiates or self.comm.size == 1:
            return True
        text = json.dumps(call)
        kinds, hashes = self._exchange(_CALLS, text)
        if (hashes == hashes[0]).all():
            return True
        callers = np.flatnonzero(kinds == _CALLS)
        if len(callers) < self.comm.size:
            self._tell_joined(text, callers)
        if not (hashes[callers] == hashes[callers[0]]).all():
            self._raise_mismatch(text)
        if len(callers) < self.comm.size:
            self._check_served(call)
        return len(callers) == self.comm.size

    def all_present(self) -> bool:
        """Agree with the ranks that have not joined whether there are any that have."""
        if not self.comm.negotiates:
            return bool(self.comm.run(lambda: self.agree(Call("present", "present"))))
        # Ranks that have joined take part in Horovod's all-reduces with zeros.
        present = self.comm.allreduce(np.ones(1, np.int64), Op.SUM)
        return int(present[0]) == self.comm.size

    def join(self) -> int:
        """Serve the calls of the others until all ranks have joined.

        Returns:
            The rank that joined last (the highest of those that joined last together).
        """
        if self.comm.size == 1:
            return 0
        last: int = (
            self.comm.join()  # type: ignore[attr-defined]
            if self.comm.negotiates
            else self.comm.run(self._join)
        )
        self._realign()
        return last

    def counter(self, what: str) -> Callable[[], int]:
        """Return a function that counts its calls from 1, and counts alike after a join."""
        label = self.name(f"counter.{what}", None)

        def count() -> int:
            self._counts[label] = self._counts.get(label, 0) + 1
            return self._counts[label]

        return count

    def _realign(self) -> None:
        """Let ranks that have made different numbers of calls count alike again."""
        text = json.dumps(self._counts).encode()
        for array in self.comm.allgather(np.frombuffer(text, np.uint8)):
            for what, count in json.loads(array.tobytes()).items():
                self._counts[what] = max(count, self._counts.get(what, 0))

    def register(self, name: str, reducer: Served) -> None:
        """Let a rank that has joined serve the steps of ``reducer``."""
        self._reducers[name] = reducer

    # --- the agreement --------------------------------------------------------------

    def _agreed(self, call: Call, make: Callable[[], Any]) -> Any:
        self.agree(call)
        return make()

    def _exchange(self, kind: int, text: str) -> tuple[Array, Array]:
        digest = np.uint64(xxhash.xxh3_64_intdigest(text.encode())).astype(np.int64)
        rows = self.comm.exchange(np.array([kind, digest], np.int64))
        joined = set(np.flatnonzero(rows[:, 0] == _JOINED).tolist())
        if len(joined) < self.comm.size:
            self._joined_before = joined
        return rows[:, 0], rows[:, 1]

    def _tell_joined(self, text: str, callers: Array) -> str:
        """Broadcast the call of the lowest calling rank, which the joined ranks do not know."""
        root = int(callers[0])
        data = np.frombuffer(text.encode(), np.uint8).copy()
        length = self.comm.broadcast(np.array([len(data)], np.int64), root)
        if self.comm.rank != root:
            data = np.empty(int(length[0]), np.uint8)
        return self.comm.broadcast(data, root).tobytes().decode()

    def _raise_mismatch(self, text: str) -> None:
        texts = [
            array.tobytes().decode()
            for array in self.comm.allgather(np.frombuffer(text.encode(), np.uint8))
        ]
        calls = {rank: _parse(text) for rank, text in enumerate(texts) if text}
        first = min(calls)
        other = next(rank for rank in calls if calls[rank] != calls[first])
        one, two = calls[first], calls[other]
        both = f"rank {first}: {one.describe()}; rank {other}: {two.describe()}"
        if one._replace(state="") == two._replace(state=""):
            raise MismatchError(
                f"ranks have different states of compression: {both}. Load those of the same "
                "checkpoint on all ranks, or on none"
            )
        raise MismatchError(
            f"ranks called different things: {both}. All ranks must make the same calls, with "
            "the same names, shapes and types, in the same order"
        )

    def _join(self) -> int:
        while True:
            kinds, hashes = self._exchange(_JOINED, "")
            callers = np.flatnonzero(kinds == _CALLS)
            if len(callers) == 0:
                late = set(range(self.comm.size)) - self._joined_before
                self._joined_before = set()
                return max(late)
            text = self._tell_joined("", callers)
            if not (hashes[callers] == hashes[callers[0]]).all():
                self._raise_mismatch("")
            self._check_served(_parse(text))
            self._serve(_parse(text))

    def _check_served(self, call: Call) -> None:
        if call.what not in _SERVED:
            raise RanksJoinedError(
                f"some ranks have joined, and the others called {call.describe()}; after join() "
                "only allreduce, allgather, alltoall and barrier go on. Call the other "
                "collectives before join(), or after all ranks have joined"
            )

    def _serve(self, call: Call) -> None:
        """Take part in a call of the others with zeros, or with no rows."""
        rows = tuple(0 if n is None else n for n in call.shape)
        if call.what == "allreduce":
            zeros = _zeros(rows, call.dtype)
            self.comm.allreduce(zeros, Op(call.op), call.scale)
        elif call.what == "reduce":
            self._reducer(call.name).serve()
        elif call.what == "allgather":
            self.comm.allgather(np.zeros(rows, call.dtype))
        elif call.what == "alltoall":
            self.comm.alltoall([np.zeros(rows, call.dtype)] * self.comm.size)
        elif call.what == "barrier":
            self.comm.barrier()

    def _reducer(self, name: str) -> Served:
        reducer = self._reducers.get(name)
        if reducer is None:
            raise MismatchError(
                f"rank {self.comm.rank} has joined and cannot serve {name!r}: it has not made the "
                "optimizer, or not reduced these gradients, that the others do. Make at least "
                "one step on every rank before join()"
            )
        return reducer


def _parse(text: str) -> Call:
    what, name, shape, *rest = json.loads(text)
    return Call(what, name, tuple(shape), *rest)


def _zeros(shape: tuple[int, ...], dtype: str) -> Any:
    """Make zeros like those of the others: on the GPU if theirs are there."""
    if dtype.startswith("torch."):
        import torch

        return torch.zeros(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="cuda")
    return np.zeros(shape, dtype)
