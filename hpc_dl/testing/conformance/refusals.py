"""What a communicator refuses: at once, on every rank, with a message that helps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpc_dl.comm import Communicator, Op
from hpc_dl.comm.protocol import Array
from hpc_dl.errors import HpcDlError, OptionError, UnsupportedError
from hpc_dl.testing.conformance.suite import OnRanks, Suite

Call = Callable[[Any], object]


def _read_only() -> Array:
    x = np.ones(4)
    x.setflags(write=False)
    return x


#: name -> (call, error, what its message says)
REFUSED: dict[str, tuple[Call, type[HpcDlError], str]] = {
    "strides": (
        lambda c: c.allreduce(np.ones((4, 4))[:, ::2]),
        UnsupportedError,
        r"allreduce works in place.*ascontiguousarray",
    ),
    "strides async": (
        lambda c: c.allreduce_async(np.ones((4, 4)).T),
        UnsupportedError,
        "ascontiguousarray",
    ),
    "strides broadcast": (
        lambda c: c.broadcast(np.ones(8)[::2]),
        UnsupportedError,
        "broadcast works in place",
    ),
    "read-only": (lambda c: c.allreduce(_read_only()), UnsupportedError, "read-only.*copy"),
    "read-only broadcast": (lambda c: c.broadcast(_read_only()), UnsupportedError, "read-only"),
    "list": (lambda c: c.allreduce([1.0, 2.0]), UnsupportedError, "NumPy arrays; got list"),
    "list gather": (lambda c: c.allgather([1.0]), UnsupportedError, "NumPy arrays; got list"),
    "objects": (
        lambda c: c.allgather(np.array([{}, "x"], object)),
        UnsupportedError,
        "holds addresses",
    ),
    "strings": (lambda c: c.allreduce(np.array(["a"])), UnsupportedError, "sum .* <U1; valid"),
    "dates": (
        lambda c: c.allreduce(np.zeros(2, "datetime64[s]")),
        UnsupportedError,
        "valid types",
    ),
    "byte order": (
        lambda c: c.allreduce(np.ones(2, ">f4")),
        UnsupportedError,
        "byte order.*newbyteorder",
    ),
    "unknown op": (
        lambda c: c.allreduce(np.ones(2), "mean"),
        OptionError,
        "unknown op 'mean'; valid: adasum, average, max, min, product, sum",
    ),
    "integer average": (
        lambda c: c.allreduce(np.ones(2, np.int32), Op.AVERAGE),
        UnsupportedError,
        "average of int32 .* op=Sum",
    ),
    "integer scale": (
        lambda c: c.allreduce(np.ones(2, np.int64), Op.SUM, 0.5),
        UnsupportedError,
        "scale factor",
    ),
    "scaled maximum": (
        lambda c: c.allreduce(np.ones(2), Op.MAX, 0.5),
        UnsupportedError,
        "scale factor",
    ),
    "bool sum": (
        lambda c: c.allreduce(np.ones(2, bool)),
        UnsupportedError,
        "not defined for bool; valid ops: min .* max",
    ),
    "bool average": (
        lambda c: c.reduce_scatter(np.ones(2, bool), Op.AVERAGE),
        UnsupportedError,
        "bool",
    ),
    "complex minimum": (
        lambda c: c.allreduce(np.ones(2, complex), Op.MIN),
        UnsupportedError,
        "complex128; valid ops: sum",
    ),
    "integer adasum": (
        lambda c: c.allreduce(np.ones(2, int), Op.ADASUM),
        UnsupportedError,
        "(?i)adasum",
    ),
    "scattered adasum": (
        lambda c: c.reduce_scatter(np.ones(2), Op.ADASUM),
        UnsupportedError,
        "no Adasum",
    ),
    "scattered scalar": (
        lambda c: c.reduce_scatter(np.ones(())),
        UnsupportedError,
        "one dimension",
    ),
    "root too large": (
        lambda c: c.broadcast(np.ones(2), c.size),
        OptionError,
        "root .* valid: 0..",
    ),
    "root below zero": (lambda c: c.broadcast(np.ones(2), -1), OptionError, "root -1"),
    "too few parts": (
        lambda c: c.alltoall([np.ones(2)] * (c.size + 1)),
        OptionError,
        "one for each",
    ),
    "scalar parts": (
        lambda c: c.alltoall([np.ones(())] * c.size),
        UnsupportedError,
        "alltoall sends rows",
    ),
}


class RefusalsConformance(Suite):
    """Errors that come before any rank waits for another."""

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, on_ranks: OnRanks, name: str) -> None:
        call, error, message = REFUSED[name]

        def check(comm: Communicator) -> None:
            with pytest.raises(error, match=message):
                call(comm)
            assert comm.allreduce(np.ones(1))[0] == comm.size

        on_ranks(check)

    def test_parts_must_be_alike(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            for other in (np.ones((1, 3)), np.ones((1, 2), np.float32)):
                parts = [np.ones((1, 2))] * (comm.size - 1) + [other]
                if comm.size > 1:
                    with pytest.raises(UnsupportedError, match=r"parts .* alike"):
                        comm.alltoall(parts)
                else:
                    np.testing.assert_array_equal(comm.alltoall(parts)[0], other)

        on_ranks(check)

    def test_adasum_where_it_is_not_available(self, on_ranks: OnRanks) -> None:
        def check(comm: Communicator) -> None:
            if comm.size == 1:
                assert comm.allreduce(np.ones(2), Op.ADASUM).tolist() == [1, 1]
                return
            with pytest.raises(UnsupportedError, match="valid ops: average, sum, min, max, prod"):
                comm.allreduce(np.ones(2), Op.ADASUM)

        if self.adasum:
            pytest.skip("this communicator has Adasum, which is tested with the reductions")
        on_ranks(check)
