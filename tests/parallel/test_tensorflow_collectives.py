"""The collectives of TensorFlow on real ranks, eagerly and in graphs; for any number of ranks."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf

import hpc_dl.tensorflow as hvd
from hpc_dl.errors import MismatchError, OptionError, UnsupportedError


@pytest.fixture(autouse=True)
def _world():
    hvd.init()


@pytest.fixture(params=["eager", "graph"])
def mode(request):
    """Return what a test wraps its function in."""
    return tf.function if request.param == "graph" else lambda function: function


def ranks() -> range:
    return range(hvd.size())


def values(rank: int, rows: int = 4, dtype: str = "float32") -> np.ndarray:
    return (np.arange(rows * 2).reshape(rows, 2) + 10 * rank).astype(dtype)


def mine(rows: int = 4, dtype: str = "float32"):
    return tf.constant(values(hvd.rank(), rows, dtype))


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [("float64", 1e-15), ("float32", 1e-6), ("float16", 1e-2), ("bfloat16", 1e-2)],
)
def test_average(mode, dtype, rtol):
    x = tf.cast(mine(), dtype)
    result = mode(hvd.allreduce)(x)
    assert result.dtype == x.dtype
    assert result.shape == x.shape
    expected = np.mean([values(r, dtype="float64") for r in ranks()], axis=0)
    np.testing.assert_allclose(tf.cast(result, tf.float64), expected, rtol=rtol)


@pytest.mark.parametrize(
    ("op", "reduce"),
    [(hvd.Sum, np.sum), (hvd.Min, np.min), (hvd.Max, np.max), (hvd.Product, np.prod)],
)
@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
def test_other_ops(mode, op, reduce, dtype):
    result = mode(lambda x: hvd.allreduce(x, op=op))(mine(2, dtype))
    expected = reduce([values(r, 2, dtype) for r in ranks()], axis=0)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_scale_factors_compression_and_horovods_older_average(mode):
    total = np.sum([values(r) for r in ranks()], axis=0)
    scaled = mode(
        lambda x: hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0)
    )(mine())
    np.testing.assert_allclose(scaled, 2 * total, rtol=1e-5)
    for compression in (hvd.Compression.none, hvd.Compression.fp16, hvd.Compression.bf16, "fp16"):
        rounded = mode(lambda x, c=compression: hvd.allreduce(x, average=False, compression=c))(
            mine()
        )
        assert rounded.dtype == tf.float32
        np.testing.assert_allclose(rounded, total, rtol=1e-2)


def test_grouped_allreduce_of_several_types_and_slices(mode):
    def run(a, b, c):
        slices = tf.IndexedSlices(tf.reshape(c, (1, 2)), tf.constant([hvd.rank()]))
        return hvd.grouped_allreduce([a, slices, b], op=hvd.Sum)

    scalar = tf.constant(float(hvd.rank()), tf.float64)
    a, slices, b = mode(run)(mine(), scalar, tf.constant([1.0, 2.0]))
    np.testing.assert_allclose(a, np.sum([values(r) for r in ranks()], axis=0))
    np.testing.assert_allclose(b, sum(ranks()))
    assert isinstance(slices, tf.IndexedSlices)
    np.testing.assert_array_equal(slices.indices, list(ranks()))
    np.testing.assert_array_equal(slices.values, [[1.0, 2.0]] * hvd.size())


def test_allgather_of_ragged_tensors(mode):
    def run(x):
        result = hvd.allgather(x)
        assert result.shape[1:] == (2,)
        return result

    gathered = mode(run)(mine(hvd.rank() + 1))
    expected = np.concatenate([values(r, r + 1) for r in ranks()])
    np.testing.assert_array_equal(gathered, expected)
    pair = mode(lambda x: hvd.grouped_allgather([x, x[:1]]))(mine(hvd.rank() + 1))
    np.testing.assert_array_equal(pair[0], expected)
    np.testing.assert_array_equal(pair[1], np.concatenate([values(r, 1) for r in ranks()]))


@pytest.mark.parametrize("dtype", ["float32", "int32", "bool"])
def test_broadcast_from_every_root(mode, dtype):
    for root in ranks():
        result = mode(lambda x, root=root: hvd.broadcast(x, root))(tf.cast(mine(), dtype))
        np.testing.assert_array_equal(result, values(root).astype(dtype))


def test_scalars(mode):
    x = tf.constant(float(hvd.rank()))
    assert float(mode(hvd.allreduce)(x)) == pytest.approx((hvd.size() - 1) / 2)
    assert float(mode(lambda x: hvd.broadcast(x, 0))(x)) == 0
    for collective in (hvd.allgather, hvd.alltoall, hvd.reducescatter):
        with pytest.raises(Exception, match=r"OptionError|scalar"):
            mode(collective)(x)


def test_alltoall(mode):
    n, rank = hvd.size(), hvd.rank()
    even = mode(hvd.alltoall)(tf.range(n) + 10 * rank)
    np.testing.assert_array_equal(even, [10 * r + rank for r in ranks()])
    # Rank r sends r + 1 rows to each.
    splits = tf.fill([n], rank + 1)
    sent = tf.fill([n * (rank + 1), 2], rank)
    output, received = mode(lambda x, s: hvd.alltoall(x, splits=s))(sent, splits)
    np.testing.assert_array_equal(received, [r + 1 for r in ranks()])
    np.testing.assert_array_equal(output[:, 0], np.repeat(list(ranks()), [r + 1 for r in ranks()]))


def test_reducescatter(mode):
    rows = hvd.size() + 1
    total = np.sum([values(r, rows) for r in ranks()], axis=0)
    part = np.array_split(total, hvd.size())[hvd.rank()]
    result = mode(lambda x: hvd.reducescatter(x, op=hvd.Sum))(mine(rows))
    np.testing.assert_allclose(result, part)
    pair = mode(lambda x: hvd.grouped_reducescatter([x, x], op=hvd.Sum))(mine(rows))
    np.testing.assert_allclose(pair[1], part)


def gradient(mode, function, x):
    """Differentiate the sum of a result, weighed by this rank's number from 1."""

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(function(x)) * float(hvd.rank() + 1)
        return tape.gradient(y, x)

    return mode(run)(x)


def test_gradients_are_horovods(mode):
    n, rank = hvd.size(), hvd.rank()
    total = sum(r + 1.0 for r in ranks())
    x = mine(2)
    summed = gradient(mode, lambda x: hvd.allreduce(x, op=hvd.Sum), x)
    np.testing.assert_allclose(summed, np.full((2, 2), total))
    averaged = gradient(mode, hvd.allreduce, x)
    np.testing.assert_allclose(averaged, np.full((2, 2), total / n), rtol=1e-6)
    pair = gradient(mode, lambda x: tf.add_n(hvd.grouped_allreduce([x, 2 * x])), x)
    np.testing.assert_allclose(pair, np.full((2, 2), 3 * total / n), rtol=1e-6)
    gathered = gradient(mode, hvd.allgather, mine(rank + 1))
    np.testing.assert_allclose(gathered, np.full((rank + 1, 2), total / n), rtol=1e-6)
    sent = gradient(mode, lambda x: hvd.broadcast(x, n - 1), x)
    np.testing.assert_allclose(sent, np.full((2, 2), total / n * (rank == n - 1)), rtol=1e-6)
    swapped = gradient(mode, lambda x: hvd.alltoall(x, tf.ones([n], tf.int32))[0], mine(n))
    np.testing.assert_allclose(swapped[:, 0], [r + 1.0 for r in ranks()])
    scattered = gradient(mode, lambda x: hvd.reducescatter(x, op=hvd.Sum), mine(n))
    np.testing.assert_allclose(scattered[:, 0], [n * (r + 1.0) for r in ranks()])


def test_collectives_of_a_graph_keep_the_order_of_the_program():
    """Nothing but their order connects them, and each rank would run them as it likes."""
    weight = tf.Variable(1.0)

    @tf.function
    def inner(x):
        return hvd.allreduce(x * weight, op=hvd.Sum)

    @tf.function
    def run(x):
        results = [hvd.allreduce(x, op=hvd.Sum)]
        for i in range(4):
            results.append(hvd.allreduce(x[: i + 1], op=hvd.Max))
            results.append(inner(x)[:1])
        results.append(tf.cond(x[0] >= 0, lambda: hvd.allreduce(x[:2]), lambda: x[:2]))
        for _ in tf.range(3):
            hvd.allgather(x)
            hvd.allreduce(x[:3])
        results.append(hvd.broadcast(x, 0))
        return results

    for _ in range(3):
        results = run(tf.range(8.0))
    np.testing.assert_array_equal(results[0], hvd.size() * np.arange(8.0))
    np.testing.assert_array_equal(results[-1], np.arange(8.0))


def test_queries_inside_a_graph(mode):
    read = mode(lambda: [hvd.rank_op(), hvd.size_op(), hvd.local_rank_op(), hvd.local_size_op()])
    assert [int(x) for x in read()] == [
        hvd.rank(),
        hvd.size(),
        hvd.local_rank(),
        hvd.local_size(),
    ]
    assert int(mode(hvd.process_set_included_op)()) == 1
    with pytest.raises(OptionError, match="process_set_id"):
        hvd.size_op(process_set_id=99)


def test_broadcast_variables(mode):
    variables = [
        tf.Variable(np.full((2, 3), float(hvd.rank())), name="a"),
        tf.Variable([hvd.rank()], name="b"),
        tf.Variable(hvd.rank() % 2 == 0, name="c"),
    ]
    root = hvd.size() - 1
    mode(lambda: hvd.broadcast_variables(variables, root))()
    np.testing.assert_array_equal(variables[0], np.full((2, 3), float(root)))
    assert int(variables[1][0]) == root
    assert bool(variables[2]) == (root % 2 == 0)
    variables[1].assign([hvd.rank()])
    assert int(hvd.broadcast_(variables[1:2], 0)[0][0]) == 0
    assert int(variables[1][0]) == 0


def test_objects():
    assert hvd.broadcast_object({"from": hvd.rank()}, 0) == {"from": 0}
    assert hvd.broadcast_object_fn(hvd.size() - 1)(hvd.rank()) == hvd.size() - 1
    assert hvd.allgather_object(hvd.rank()) == list(ranks())


def test_barrier_and_join_return(mode):
    mode(hvd.barrier)()
    assert int(mode(hvd.join)()) in ranks()


def test_a_process_set():
    if hvd.size() == 1:
        pytest.skip("one rank has no smaller set of ranks")
    most = hvd.add_process_set(range(1, hvd.size()))
    try:
        if most.included():
            total = tf.function(lambda x: hvd.allreduce(x, op=hvd.Sum, process_set=most))(mine())
            expected = np.sum([values(r) for r in range(1, hvd.size())], axis=0)
            np.testing.assert_allclose(total, expected)
        else:
            with pytest.raises(OptionError, match="not in"):
                hvd.allreduce(mine(), process_set=most)
    finally:
        hvd.remove_process_set(most)


def test_ranks_that_differ_are_told_how():
    if hvd.size() == 1:
        pytest.skip("one rank cannot differ from itself")
    x = tf.zeros(hvd.rank() + 1)
    with pytest.raises(MismatchError, match=r"shape \W\d\W.*shape \W\d\W"):
        hvd.allreduce(x, name="x")
    with pytest.raises(tf.errors.OpError, match=r"ismatch.*shape \W\d\W.*shape \W\d\W"):
        tf.function(lambda x: hvd.allreduce(x, name="x"))(x)


def test_what_cannot_be_done_names_the_remedy():
    with pytest.raises(Exception, match=r"UnsupportedError.*jit_compile=False"):
        tf.function(lambda x: hvd.allgather(x), jit_compile=True)(mine())
    slices = tf.IndexedSlices(mine(), tf.range(4))
    with pytest.raises(UnsupportedError, match="sparse_as_dense"):
        hvd.allreduce(slices, op=hvd.Max)
    with pytest.raises(UnsupportedError, match="scale"):
        hvd.allreduce(slices, prescale_factor=2.0)
    for old in (hvd.broadcast_global_variables, hvd.BroadcastGlobalVariablesHook):
        with pytest.raises(UnsupportedError, match="broadcast_variables"):
            old(0)
    with pytest.raises(OptionError, match="not both"):
        hvd.allreduce(mine(), average=True, op=hvd.Sum)
    with pytest.raises(OptionError, match="bf16"):
        hvd.allreduce(mine(), compression="zip")
