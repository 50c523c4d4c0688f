"""Horovod's collectives on torch tensors, on real ranks; true for any number of them."""

import pytest
import torch

import hpc_dl.torch as hvd
from hpc_dl.errors import MismatchError, OptionError
from hpc_dl.world import current

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.fixture(autouse=True)
def _world():
    hvd.init()


def mine(dtype=torch.float32, shape=(3, 4), rank=None):
    """Make a tensor of small whole numbers that depend on the rank: sums are exact."""
    rank = hvd.rank() if rank is None else rank
    count = int(torch.tensor(shape).prod())
    return (torch.arange(count).remainder(5) + rank).reshape(shape).to(dtype)


def everyone(dtype=torch.float32, shape=(3, 4)):
    return torch.stack([mine(dtype, shape, rank) for rank in range(hvd.size())])


EXPECTED = {
    hvd.Sum: lambda t: t.sum(0),
    hvd.Min: lambda t: t.min(0).values,
    hvd.Max: lambda t: t.max(0).values,
    hvd.Product: lambda t: t.prod(0),
    hvd.Average: lambda t: t.double().mean(0).to(t.dtype),
}


@pytest.mark.parametrize("dtype", FLOATS + INTS)
@pytest.mark.parametrize("op", EXPECTED)
def test_allreduce(op, dtype):
    expected = EXPECTED[op](everyone(dtype)).to(dtype)
    before = mine(dtype)
    tensor = before.clone()
    result = hvd.allreduce(tensor, op=op)
    assert torch.equal(result, expected)
    assert result.dtype == dtype
    assert torch.equal(tensor, before)
    assert torch.equal(hvd.synchronize(hvd.allreduce_async(tensor, op=op)), expected)
    assert hvd.allreduce_(tensor, op=op) is tensor
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (1000, 7), (300_001,)])
def test_allreduce_of_any_shape(shape):
    result = hvd.allreduce(mine(shape=shape), op=hvd.Sum)
    assert torch.equal(result, everyone(shape=shape).sum(0))


def test_allreduce_of_a_transposed_tensor_in_place():
    tensor = mine(shape=(4, 3)).t()
    hvd.allreduce_(tensor, op=hvd.Sum)
    assert torch.equal(tensor, everyone(shape=(4, 3)).sum(0).t())


def test_the_default_is_the_average():
    assert torch.allclose(hvd.allreduce(mine()), everyone().mean(0))
    assert torch.allclose(hvd.allreduce(mine(), average=True), everyone().mean(0))
    assert torch.equal(hvd.allreduce(mine(), average=False), everyone().sum(0))
    with pytest.raises(OptionError, match="not both"):
        hvd.allreduce(mine(), average=True, op=hvd.Sum)


def test_scale_factors():
    result = hvd.allreduce(mine(), op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0)
    assert torch.equal(result, everyone().sum(0) * 2)


def test_an_average_of_large_halves_does_not_overflow():
    tensor = torch.full((100,), 60000.0, dtype=torch.float16)
    assert torch.equal(hvd.allreduce(tensor), tensor)
    long = torch.full((100_000,), 60000.0, dtype=torch.float16)
    assert torch.equal(hvd.allreduce(long), long)


@pytest.mark.parametrize("compression", [hvd.Compression.fp16, hvd.Compression.bf16, "none"])
def test_compression_keeps_the_type(compression):
    result = hvd.allreduce(mine(), op=hvd.Sum, compression=compression)
    assert result.dtype == torch.float32
    assert torch.equal(result, everyone().sum(0))
    assert (
        hvd.allreduce(mine(torch.int32), op=hvd.Sum, compression=compression).dtype == torch.int32
    )


def test_many_started_and_finished_in_another_order():
    tensors = [mine(shape=(n,)) for n in (5, 70_000, 0, 3, 300_000)]
    handles = [hvd.allreduce_async(t, op=hvd.Sum, name=f"many.{i}") for i, t in enumerate(tensors)]
    for tensor, handle in reversed(list(zip(tensors, handles, strict=True))):
        assert torch.equal(hvd.synchronize(handle), everyone(shape=tensor.shape).sum(0))
        assert hvd.poll(handle)


def test_grouped_allreduce_of_mixed_types():
    shapes = [
        (torch.float32, (3,)),
        (torch.int64, (2, 2)),
        (torch.float32, (5, 1)),
        (torch.float64, ()),
    ]
    tensors = [mine(d, s) for d, s in shapes]
    expected = [everyone(d, s).sum(0) for d, s in shapes]
    for result in (
        hvd.grouped_allreduce(tensors, op=hvd.Sum),
        hvd.synchronize(hvd.grouped_allreduce_async(tensors, op=hvd.Sum, name="group")),
        hvd.grouped_allreduce_(tensors, op=hvd.Sum),
    ):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("dtype", [*FLOATS, *INTS, torch.bool])
def test_allgather_of_ragged_rows(dtype):
    tensor = torch.full((hvd.rank(), 2), hvd.rank()).to(dtype)
    expected = torch.cat([torch.full((r, 2), r).to(dtype) for r in range(hvd.size())])
    assert torch.equal(hvd.allgather(tensor), expected)
    first, second = hvd.grouped_allgather([tensor, tensor[:, 0]])
    assert torch.equal(first, expected)
    assert torch.equal(second, expected[:, 0])
    handle = hvd.grouped_allgather_async([tensor], name="gather")
    assert torch.equal(hvd.synchronize(handle)[0], expected)


def test_allgather_of_a_scalar_is_refused():
    with pytest.raises(OptionError, match="scalar"):
        hvd.allgather(torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [*FLOATS, *INTS, torch.bool])
def test_broadcast(dtype):
    root = hvd.size() - 1
    tensor = mine(dtype)
    expected = mine(dtype, rank=root)
    assert torch.equal(hvd.broadcast(tensor, root), expected)
    assert torch.equal(hvd.synchronize(hvd.broadcast_async(tensor, root)), expected)
    assert torch.equal(tensor, mine(dtype))
    assert hvd.broadcast_(tensor, root) is tensor
    assert torch.equal(tensor, expected)


def test_broadcast_from_no_rank():
    with pytest.raises(OptionError, match="valid: 0"):
        hvd.broadcast(mine(), hvd.size())


def test_alltoall_with_splits():
    size, rank = hvd.size(), hvd.rank()
    splits = torch.tensor([rank + d for d in range(size)])
    tensor = torch.cat([torch.full((rank + d, 2), 10.0 * rank + d) for d in range(size)])
    output, received = hvd.alltoall(tensor, splits)
    assert received.tolist() == [s + rank for s in range(size)]
    expected = torch.cat([torch.full((s + rank, 2), 10.0 * s + rank) for s in range(size)])
    assert torch.equal(output, expected)


def test_alltoall_in_equal_parts():
    tensor = torch.arange(2 * hvd.size()).float() + 100 * hvd.rank()
    part = torch.arange(2 * hvd.rank(), 2 * hvd.rank() + 2).float()
    expected = torch.cat([part + 100 * s for s in range(hvd.size())])
    assert torch.equal(hvd.alltoall(tensor), expected)
    assert torch.equal(hvd.synchronize(hvd.alltoall_async(tensor)), expected)


@pytest.mark.parametrize("splits", [[1], [-1, 2, 3, 4]])
def test_bad_splits(splits):
    with pytest.raises(OptionError, match="splits"):
        hvd.alltoall(torch.zeros(8), splits)


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average])
def test_reducescatter(op):
    shape = (2 * hvd.size() + 1, 3)
    expected = torch.tensor_split(EXPECTED[op](everyone(shape=shape)), hvd.size())[hvd.rank()]
    assert torch.allclose(hvd.reducescatter(mine(shape=shape), op=op), expected)
    first, second = hvd.grouped_reducescatter([mine(shape=shape)] * 2, op=op)
    assert torch.allclose(first, expected)
    assert torch.allclose(second, expected)
    handle = hvd.grouped_reducescatter_async([mine(shape=shape)], op=op)
    assert torch.allclose(hvd.synchronize(handle)[0], expected)


# --- gradients: those of Horovod ---------------------------------------------------------


def weights(shape):
    """Make the gradient that flows back on this rank."""
    return torch.arange(float(torch.tensor(shape).prod())).reshape(shape) + 10 * hvd.rank()


def all_weights(shape):
    base = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    return torch.stack([base + 10 * r for r in range(hvd.size())])


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average])
def test_gradient_of_allreduce(op):
    x = mine().requires_grad_()
    (hvd.allreduce(x, op=op) * weights((3, 4))).sum().backward()
    assert torch.allclose(x.grad, EXPECTED[op](all_weights((3, 4))))


def test_gradient_of_grouped_allreduce():
    xs = [mine().requires_grad_(), mine(shape=(5,)).requires_grad_()]
    results = hvd.grouped_allreduce(xs, op=hvd.Sum)
    sum((y * weights(tuple(y.shape))).sum() for y in results).backward()
    for x in xs:
        assert torch.allclose(x.grad, all_weights(tuple(x.shape)).sum(0))


def test_gradient_of_allgather():
    x = mine(shape=(hvd.rank() + 1, 2)).requires_grad_()
    rows = sum(r + 1 for r in range(hvd.size()))
    (hvd.allgather(x) * weights((rows, 2))).sum().backward()
    before = sum(r + 1 for r in range(hvd.rank()))
    expected = all_weights((rows, 2)).mean(0)[before : before + hvd.rank() + 1]
    assert torch.allclose(x.grad, expected)


def test_gradient_of_broadcast():
    root = hvd.size() - 1
    x = mine().requires_grad_()
    (hvd.broadcast(x, root) * weights((3, 4))).sum().backward()
    expected = all_weights((3, 4)).mean(0) * (hvd.rank() == root)
    assert torch.allclose(x.grad, expected)


def test_gradient_of_alltoall():
    size, rank = hvd.size(), hvd.rank()
    x = torch.zeros(size, 2, requires_grad=True)
    output, _ = hvd.alltoall(x, [1] * size)
    (output * torch.full((size, 2), rank + 1.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(1.0, size + 1).reshape(-1, 1).expand(size, 2))


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average])
def test_gradient_of_reducescatter(op):
    size = hvd.size()
    x = torch.zeros(size, 2, requires_grad=True)
    (hvd.reducescatter(x, op=op) * (hvd.rank() + 1.0)).sum().backward()
    factor = size if op is hvd.Sum else 1
    expected = torch.arange(1.0, size + 1).reshape(-1, 1).expand(size, 2) * factor
    assert torch.equal(x.grad, expected)


# --- groups and mistakes -----------------------------------------------------------------


def test_a_process_set_reduces_among_its_ranks():
    if hvd.size() == 1:
        pytest.skip("one rank has no part")
    ranks = list(range(1, hvd.size()))
    process_set = hvd.add_process_set(ranks)
    assert process_set.included() == (hvd.rank() in ranks)
    if process_set.included():
        result = hvd.allreduce(mine(), op=hvd.Sum, process_set=process_set)
        assert torch.equal(result, everyone()[1:].sum(0))
        assert torch.equal(hvd.broadcast(mine(), 1, process_set=process_set), mine(rank=1))
        assert process_set.size() == len(ranks)
        assert process_set.rank() == hvd.rank() - 1
    else:
        with pytest.raises(OptionError, match="not in"):
            hvd.allreduce(mine(), process_set=process_set)
    net = torch.nn.Linear(2, 1)
    hvd.broadcast_parameters(net.state_dict())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=1.0), net.named_parameters(), process_set=process_set
    )
    start = net.bias.detach().clone()
    (net.bias * (hvd.rank() + 1.0)).sum().backward()
    optimizer.step()
    mean = sum(r + 1 for r in ranks) / len(ranks) if hvd.rank() in ranks else 1.0
    assert torch.allclose(net.bias.detach(), start - mean)
    assert hvd.remove_process_set(process_set)
    assert not hvd.remove_process_set(process_set)


def test_different_shapes_are_an_error_that_names_both():
    if hvd.size() == 1:
        pytest.skip("one rank cannot differ from itself")
    with pytest.raises(MismatchError, match=r"3.*4|4.*3"):
        hvd.allreduce(torch.zeros(3 + (hvd.rank() == 0)), name="same")
    assert torch.equal(hvd.allreduce(mine(), op=hvd.Sum), everyone().sum(0))


def test_different_names_are_an_error_that_names_both():
    if hvd.size() == 1 or current().comm.negotiates:
        pytest.skip("needs several ranks, and Horovod waits for names to match, in any order")
    with pytest.raises(MismatchError, match=r"'only.0'.*'only.1'"):
        hvd.allreduce(torch.zeros(3), name=f"only.{min(hvd.rank(), 1)}")


def test_objects():
    objects = hvd.allgather_object({"rank": hvd.rank()})
    assert objects == [{"rank": r} for r in range(hvd.size())]
    assert hvd.broadcast_object(hvd.rank(), root_rank=hvd.size() - 1) == hvd.size() - 1


def test_queries():
    assert hvd.is_initialized()
    assert 0 <= hvd.rank() < hvd.size()
    assert 0 <= hvd.local_rank() < hvd.local_size() <= hvd.size()
    assert hvd.cross_size() * hvd.local_size() == hvd.size()
    assert hvd.is_homogeneous()
    assert hvd.mpi_built()
    assert hvd.mpi_enabled() == (current().comm.name in ("mpi", "horovod"))
    for query in ("gloo_built", "nccl_built", "ccl_built", "ddl_built", "cuda_built", "rocm_built"):
        assert getattr(hvd, query)() in (True, False)
    hvd.barrier()
