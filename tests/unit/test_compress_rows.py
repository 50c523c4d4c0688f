"""Rows of sparse gradients: what travels, what comes out, and what is counted."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hpc_dl.torch as hvd
from hpc_dl.arrays import BFLOAT16
from hpc_dl.comm import Communicator, Op
from hpc_dl.compress import Policy, only, policy_of
from hpc_dl.compress.kernels import rows as kernels
from hpc_dl.compress.rows import RowFormat, Rows, row_format, summed
from hpc_dl.errors import UnsupportedError
from hpc_dl.reduce.rows import reduce_rows
from hpc_dl.testing import run_threads
from hpc_dl.testing.same import assert_same_bytes

pytestmark = pytest.mark.timeout(120)

F32 = np.dtype(np.float32)
TABLE = (1000, 24)
SPECS: list[tuple[Any, float]] = [
    ("none", 0.0),
    ("fp16", 2.0**-11),
    ("bf16", 2.0**-8),
    (only("*", "int8", min_bytes=0), 0.5 / 127),
]


def _rows(seed: int, count: int, width: int = 24, top: int = 1000) -> Rows:
    rng = np.random.default_rng(seed)
    numbers = np.sort(rng.choice(top, count, replace=False))
    return Rows(numbers, rng.standard_normal((count, width)).astype(np.float32))


def _format(spec: Any, shape: tuple[int, ...] = TABLE, dtype: Any = F32) -> RowFormat:
    return row_format(policy_of(spec), "embedding", shape, dtype)


@pytest.mark.parametrize(("spec", "error"), SPECS)
@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(0, 40),
    width=st.sampled_from([1, 3, 8, 24, 130]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_rows_come_back(spec: Any, error: float, count: int, width: int, scale: float, seed: int):
    form = _format(spec, (1000, width))
    rows = _rows(seed, count, width)
    rows.values[:] *= np.float32(scale)
    payload = form.encode(rows)
    assert len(payload) == count * form.row_bytes
    found = form.decode(payload)
    assert_same_bytes(found.numbers, rows.numbers)
    assert found.values.shape == rows.values.shape
    largest = np.abs(rows.values).max(axis=1, initial=0, keepdims=True)
    within = error * 1.01 * largest + 1e-7 * scale + 2.0**-25  # half of the least float16
    assert (np.abs(found.values - rows.values) <= within).all()


@pytest.mark.parametrize(
    ("spec", "row_bytes"),
    [
        ("none", 4 + 96),
        ("fp16", 4 + 48),
        ("bf16:error_feedback=fp32", 4 + 48),
        ("topk", 4 + 96),
        (only("*", "int8", min_bytes=0), 4 + 4 + 24),
    ],
)
def test_bytes_of_a_row(spec: Any, row_bytes: int) -> None:
    assert _format(spec).row_bytes == row_bytes
    assert _format(spec).plain_row_bytes == 8 + 96


def test_the_format_follows_the_rules_and_the_type() -> None:
    policy = policy_of([("big.*", "int8"), ("*", "fp16")])
    assert row_format(policy, "big.weight", (100_000, 16), F32).wire == np.int8
    assert row_format(policy, "big.weight", (10, 16), F32).wire == np.float16  # below 64 KB
    assert row_format(policy, "other", (10, 16), F32).wire == np.float16
    assert _format("fp16", (1000, 24), np.float64).wire == np.float16
    assert _format("fp16", (1000, 24), np.int64).wire == np.int64
    # A scale for each row must not cost more than it saves.
    assert _format(only("*", "int8", min_bytes=0), (1000, 1)).wire == np.float32
    assert _format(only("*", "int8", min_bytes=0), (1000, 4), np.float16).wire == np.float16
    assert _format("none", (2**31, 1)).number == np.int32
    assert _format("none", (2**31 + 1, 1)).number == np.int64
    assert row_format(Policy(()), "w", (2**20, 2**20, 3), F32, 2).number == np.int64


def test_the_last_number_fits() -> None:
    for size in (2**31, 2**31 + 1):
        rows = Rows(np.array([0, size - 1]), np.ones((2, 1), np.float32))
        form = _format("none", (size, 1))
        assert form.decode(form.encode(rows)).numbers.tolist() == [0, size - 1]


@pytest.mark.parametrize(("spec", "error"), SPECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(spec: Any, error: float, bad: float) -> None:
    rows = _rows(0, 5)
    rows.values[2, 3] = bad
    form = _format(spec)
    found = form.decode(form.encode(rows)).values
    assert not np.isfinite(found[2]).all()
    assert np.isfinite(np.delete(found, 2, axis=0)).all()


@settings(max_examples=50, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 9), max_size=30),
    width=st.integers(1, 20),
    dtype=st.sampled_from(["float32", "float64", "float16", "bfloat16"]),
)
def test_rows_of_one_number_are_added_up(numbers: list[int], width: int, dtype: str) -> None:
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    given_rows = np.arange(len(numbers) * width).reshape(-1, width) % 31 / 4  # sums are exact
    found = summed(np.array(numbers, np.int64), given_rows.astype(kind))
    assert found.numbers.tolist() == sorted(set(numbers))
    assert found.values.dtype == (np.float64 if dtype == "float64" else np.float32)
    wanted = np.zeros((10, width))
    np.add.at(wanted, np.array(numbers, np.int64), given_rows)
    np.testing.assert_array_equal(found.values, wanted[found.numbers])


@settings(max_examples=30, deadline=None)
@given(places=st.lists(st.integers(0, 9), max_size=30), width=st.integers(1, 20))
def test_both_codes_add_alike(places: list[int], width: int) -> None:
    values = np.random.default_rng(0).standard_normal((len(places), width)).astype(np.float32)
    results = []
    for code in (kernels.add_rows.reference, kernels.add_rows.fastest):
        out = np.ones((10, width), np.float32)
        code(np.array(places, np.int64), values, out)
        results.append(out)
    assert_same_bytes(*results)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("op", [Op.AVERAGE, Op.SUM])
@pytest.mark.parametrize(("spec", "error"), SPECS)
def test_rows_are_combined(size: int, op: Op, spec: Any, error: float) -> None:
    form = _format(spec)
    every = [_rows(rank, 10 * rank) for rank in range(size)]

    def main(comm: Communicator) -> tuple[Rows, Any]:
        return reduce_rows(comm, every[comm.rank], form, op)

    results = run_threads(size, main)
    wanted = np.zeros(TABLE)
    for rows in every:
        wanted[rows.numbers] += rows.values / (size if op is Op.AVERAGE else 1)
    for rank, (rows, traffic) in enumerate(results):
        assert_same_bytes(rows.numbers, results[0][0].numbers)
        assert_same_bytes(rows.values, results[0][0].values)
        assert rows.values.dtype == np.float32
        assert rows.numbers.tolist() == sorted({n for part in every for n in part.numbers})
        np.testing.assert_allclose(rows.values, wanted[rows.numbers], atol=4 * size * error + 1e-5)
        assert traffic.bytes_sent == (size - 1) * 10 * rank * form.row_bytes
        assert traffic.bytes_dense == (size - 1) * 10 * rank * (8 + 4 * 24)


# --- torch ------------------------------------------------------------------------------


def _train(
    comm: Communicator, compression: Any, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Any]:
    """Take two steps on an embedding; return the last gradient, and the traffic."""
    hvd.init(comm)
    try:
        table = torch.nn.Embedding(1000, 24, sparse=True, dtype=dtype)
        with torch.no_grad():
            table.weight.zero_()
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(table.parameters(), 0.0),
            table.named_parameters(),
            compression=compression,
        )
        for _ in range(2):
            optimizer.zero_grad()
            rng = np.random.default_rng(comm.rank)
            words = torch.from_numpy(rng.integers(0, 100, 50))
            factors = torch.from_numpy(rng.standard_normal((50, 24)).astype(np.float32))
            (table(words) * factors).sum().backward()
            optimizer.step()
        assert table.weight.grad is not None
        return table.weight.grad, optimizer.traffic()
    finally:
        hvd.shutdown()


@pytest.mark.parametrize(("spec", "error"), SPECS)
def test_torch_sends_rows_as_the_policy_says(spec: Any, error: float) -> None:
    def main(comm: Communicator) -> tuple[torch.Tensor, Any]:
        return _train(comm, spec)

    (exact, plain), _ = run_threads(2, lambda comm: _train(comm, "none"))
    results = run_threads(2, main)
    rows = len(np.unique(np.random.default_rng(0).integers(0, 100, 50)))
    for grad, _ in results:
        assert grad.is_sparse
        assert grad.is_coalesced()
        assert torch.equal(grad.to_dense(), results[0][0].to_dense())
        assert torch.allclose(grad.to_dense(), exact.to_dense(), atol=16 * error + 1e-5)
    traffic = results[0][1]
    assert traffic.bytes_sent == 2 * rows * _format(spec).row_bytes
    assert traffic.bytes_dense == plain.bytes_dense == 2 * rows * (8 + 4 * 24)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_keeps_the_type(dtype: torch.dtype) -> None:
    for grad, _ in run_threads(2, lambda comm: _train(comm, "fp16", dtype)):
        assert grad.dtype is dtype


def test_torch_refuses_what_needs_all_rows() -> None:
    def main(comm: Communicator) -> None:
        hvd.init(comm)
        try:
            table = torch.nn.Embedding(4, 2, sparse=True)
            optimizer = hvd.DistributedOptimizer(
                torch.optim.SGD(table.parameters(), 1.0), table.named_parameters(), op=hvd.Max
            )
            table(torch.tensor([1])).sum().backward()
            with pytest.raises(UnsupportedError, match="sparse_as_dense"):
                optimizer.step()
        finally:
            hvd.shutdown()

    run_threads(2, main)
