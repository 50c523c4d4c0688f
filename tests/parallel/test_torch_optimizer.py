"""The distributed optimizer of torch on real ranks; true for any number of them."""

import gc
import weakref

import pytest
import torch
from torch_training import OPTIMIZERS, batch, furthest, loss_of, model, train_alone, train_sharded
from waiting import is_freed

import hpc_dl.torch as hvd
import hpc_dl.torch.gradients as gradients
from hpc_dl.compress import only, unchecked
from hpc_dl.errors import (
    HpcDlError,
    MismatchError,
    OptionError,
    ReplicaDivergenceError,
    UnsupportedError,
)
from hpc_dl.world import current

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


@pytest.fixture(autouse=True)
def _world():
    hvd.init()


@pytest.fixture
def rows() -> int:
    return 12 * hvd.size()


@pytest.fixture
def small_buckets(monkeypatch):
    """Make even the small models of these tests use several buckets that leave early."""
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 4096)
    monkeypatch.setattr("hpc_dl.reduce.reducer.OVERLAP_BYTES", 0)


def sgd(net, **options):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return hvd.DistributedOptimizer(optimizer, net.named_parameters(), **options)


def shard(step: int, rows: int, dtype=torch.float64):
    x, y = batch(step, rows, dtype)
    return x[hvd.rank() :: hvd.size()], y[hvd.rank() :: hvd.size()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_n_ranks_train_like_one_with_n_times_the_batch(name, dtype, rows):
    alone = train_alone(OPTIMIZERS[name], 5, rows, dtype)
    together = train_sharded(OPTIMIZERS[name], 5, rows, dtype)
    assert furthest(alone, together) <= TOLERANCE[dtype]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_exact_with_overlapped_buckets(rows, small_buckets, set_to_none):
    alone = train_alone(OPTIMIZERS["sgd"], 6, rows, torch.float64)
    together = train_sharded(OPTIMIZERS["sgd"], 6, rows, torch.float64, set_to_none)
    assert furthest(alone, together) <= 1e-10


@pytest.mark.parametrize("groups", [1, 2, 100])
def test_groups_do_not_change_the_result(rows, groups, small_buckets):
    alone = train_alone(OPTIMIZERS["adam"], 4, rows, torch.float64)
    together = train_sharded(OPTIMIZERS["adam"], 4, rows, torch.float64, groups=groups)
    assert furthest(alone, together) <= 1e-10


def test_groups_as_lists_travel_together():
    net = model()
    parameters = list(net.parameters())
    optimizer = sgd(net, groups=[parameters[:2], parameters[4:6]])
    loss_of(net, *shard(0, 12 * hvd.size())).backward()
    optimizer.step()
    if hvd.size() > 1:
        buckets = optimizer._reduction._reducers[0].layout.buckets
        names = sorted(sorted(p.name for p in bucket.parameters) for bucket in buckets)
        assert names == [["0.bias", "0.weight"], ["2.bias", "2.weight"], ["4.bias", "4.weight"]]


def test_predivide_factor_does_not_change_the_average(rows):
    alone = train_alone(OPTIMIZERS["sgd"], 3, rows, torch.float64)
    for set_to_none in (True, False):
        together = train_sharded(
            OPTIMIZERS["sgd"], 3, rows, torch.float64, set_to_none, gradient_predivide_factor=3.0
        )
        assert furthest(alone, together) <= 1e-10


@pytest.mark.parametrize("compression", ["fp16", "bf16", hvd.Compression.fp16])
def test_compressed_gradients_are_the_average_to_their_precision(compression):
    net = model(torch.float32)
    optimizer = sgd(net, compression=compression)
    for p in net.parameters():
        p.grad = None
    loss_of(net, *shard(0, 12 * hvd.size(), torch.float32)).backward()
    local = [p.grad.clone() for p in net.parameters()]
    optimizer.synchronize()
    relative = 2.0**-7 if compression == "bf16" else 2.0**-9
    for p, mine in zip(net.parameters(), local, strict=True):
        exact = hvd.allreduce(mine)
        assert p.grad.dtype == torch.float32
        biggest = float(hvd.allreduce(mine.abs(), op=hvd.Max).max())
        assert (p.grad - exact).abs().max() <= relative * biggest


def test_compression_halves_the_bytes():
    sent = []
    for compression in ("none", "bf16"):
        net = model(torch.float32, width=64)
        optimizer = sgd(net, compression=compression)
        loss_of(net, *shard(0, 12 * hvd.size(), torch.float32)).backward()
        optimizer.step()
        sent.append(optimizer.traffic().bytes_sent)
    assert sent[1] <= sent[0] / 2 * 1.1
    assert (sent[0] > 0) == (hvd.size() > 1)


class Negated(hvd.Compressor):
    """Send the negative: an own compressor whose payload is not the gradient."""

    @staticmethod
    def compress(tensor):
        return -tensor, None

    @staticmethod
    def decompress(tensor, ctx):
        return -tensor


def test_an_own_compressor_is_used(rows):
    alone = train_alone(OPTIMIZERS["sgd"], 3, rows, torch.float64)
    together = train_sharded(OPTIMIZERS["sgd"], 3, rows, torch.float64, compression=Negated)
    assert furthest(alone, together) <= 1e-10


@pytest.mark.parametrize("passes", [2, 3])
def test_accumulation_adds_up_passes_and_reduces_once(passes, rows, small_buckets):
    net, reference = model(), model()
    optimizer = sgd(net, backward_passes_per_step=passes)
    own = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        own.zero_grad()
        for i in range(passes):
            number = step * passes + i
            (loss_of(net, *shard(number, rows)) / passes).backward()
            (loss_of(reference, *batch(number, rows, torch.float64)) / passes).backward()
        optimizer.step()
        own.step()
    assert furthest(net, reference) <= 1e-10
    if hvd.size() > 1:
        assert optimizer.traffic().steps == 3


def test_more_passes_than_announced_is_an_error():
    if hvd.size() == 1:
        pytest.skip("one rank reduces nothing, so any number of passes is right")
    net = model()
    optimizer = sgd(net)
    loss_of(net, *shard(0, 12 * hvd.size())).backward()
    with pytest.raises(HpcDlError, match="backward_passes_per_step is 1"):
        loss_of(net, *shard(0, 12 * hvd.size())).backward()
    optimizer.step()


def test_zero_grad_between_backward_and_step_is_an_error():
    if hvd.size() == 1:
        pytest.skip("one rank reduces nothing, so there is nothing to race with")
    net = model()
    optimizer = sgd(net)
    loss_of(net, *shard(0, 12 * hvd.size())).backward()
    with pytest.raises(HpcDlError, match=r"between backward\(\) and step\(\)"):
        optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()


def test_clipping_between_synchronize_and_step(rows):
    net, reference = model(), model()
    optimizer = sgd(net)
    own = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        own.zero_grad()
        loss_of(net, *shard(step, rows)).backward()
        optimizer.synchronize()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        with optimizer.skip_synchronize():
            optimizer.step()
        loss_of(reference, *batch(step, rows, torch.float64)).backward()
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        own.step()
        assert float(norm) == pytest.approx(float(expected), abs=1e-10)
    assert furthest(net, reference) <= 1e-10


def test_step_after_synchronize_warns_without_skip():
    net = model()
    optimizer = sgd(net)
    loss_of(net, *shard(0, 12 * hvd.size())).backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="skip_synchronize"):
        optimizer.step()


def test_a_closure_is_reduced_each_time_it_is_called(rows):
    net, reference = model(), model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4), net.named_parameters()
    )
    own = torch.optim.LBFGS(reference.parameters(), lr=0.5, max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, *shard(0, rows))
        loss.backward()
        return hvd.allreduce(loss.detach())

    def own_closure():
        own.zero_grad()
        loss = loss_of(reference, *batch(0, rows, torch.float64))
        loss.backward()
        return loss

    optimizer.step(closure)
    own.step(own_closure)
    assert furthest(net, reference) <= 1e-8


def test_a_gradient_that_only_some_ranks_have_counts_as_zero_elsewhere(small_buckets):
    for _ in range(3):
        net = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(3, 2)}).double()
        torch.nn.init.constant_(net["a"].weight, 1.0)
        torch.nn.init.constant_(net["b"].weight, 1.0)
        hvd.broadcast_parameters(net.state_dict())
        optimizer = sgd(net)
        for _ in range(3):
            optimizer.zero_grad()
            name = "b" if hvd.rank() == hvd.size() - 1 else "a"
            net[name](torch.ones(1, 3, dtype=torch.float64)).sum().backward()
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
            share = 1 / hvd.size()
            if hvd.size() > 1:
                assert torch.allclose(net["b"].weight.grad, torch.full((2, 3), share).double())
                assert torch.allclose(net["a"].weight.grad, torch.full((2, 3), 1 - share).double())


@pytest.mark.parametrize("as_dense", [False, True])
def test_sparse_gradients_of_an_embedding(as_dense):
    net = torch.nn.Sequential(
        torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 2)
    ).double()
    hvd.broadcast_parameters(net.state_dict())
    reference = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2)).double()
    reference.load_state_dict(net.state_dict())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.5), net.named_parameters(), sparse_as_dense=as_dense
    )
    own = torch.optim.SGD(reference.parameters(), lr=0.5)
    for step in range(3):
        words = torch.arange(3 * hvd.size()).add(step).remainder(7)
        optimizer.zero_grad()
        net(words[hvd.rank() :: hvd.size()]).square().mean().backward()
        optimizer.step()
        own.zero_grad()
        reference(words).square().mean().backward()
        own.step()
        assert net[0].weight.grad.is_sparse
    assert furthest(net, reference) <= 1e-10


def test_a_scheduler_sees_the_wrapped_optimizer(rows):
    net, reference = model(), model()
    optimizer = sgd(net)
    own = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, own)]
    for step in range(3):
        for o, m, data in (
            (optimizer, net, shard(step, rows)),
            (own, reference, batch(step, rows, torch.float64)),
        ):
            o.zero_grad()
            loss_of(m, *data).backward()
            o.step()
        for scheduler in schedulers:
            scheduler.step()
    assert isinstance(optimizer, torch.optim.SGD)
    assert furthest(net, reference) <= 1e-10


def test_parameters_added_later_are_reduced(rows):
    net, extra = model(), torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = sgd(net)
    loss_of(net, *shard(0, rows)).backward()
    optimizer.step()
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    optimizer.zero_grad()
    (extra * (hvd.rank() + 1.0)).sum().backward()
    optimizer.step()
    mean = sum(range(1, hvd.size() + 1)) / hvd.size()
    assert torch.allclose(extra.detach(), torch.full((3,), -mean, dtype=torch.float64))


def test_wrapping_keeps_the_state_of_the_optimizer(rows):
    net = model()
    plain = torch.optim.Adam(net.parameters(), lr=0.01)
    loss_of(net, *batch(0, rows, torch.float64)).backward()
    plain.step()
    wrapped = hvd.DistributedOptimizer(plain, net.named_parameters())
    assert wrapped.state_dict()["state"][0]["step"] == 1


# --- what is refused --------------------------------------------------------------------


def test_duplicate_names():
    net = model()
    named = [("same", p) for p in net.parameters()]
    with pytest.raises(OptionError, match="duplicate names: same"):
        hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=1), named)


def test_unnamed_parameters():
    net = model()
    with pytest.raises(OptionError, match="leaves out 5 of the optimizer's 6"):
        hvd.DistributedOptimizer(
            torch.optim.SGD(net.parameters(), lr=1), list(net.named_parameters())[:1]
        )


def test_names_that_are_no_tuples():
    net = model()
    with pytest.raises(OptionError, match="tuples"):
        hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=1), net.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backward_passes_per_step": 0}, "1 or more"),
        ({"op": "median"}, "valid: adasum, average, max"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, "op=Average only"),
        ({"gradient_predivide_factor": -1.0}, "> 0"),
        ({"compression": "zip"}, "valid: auto, bf16, demo"),
        ({"compression": 3}, "compress"),
    ],
)
def test_bad_options(options, message):
    net = model()
    with pytest.raises(OptionError, match=message):
        sgd(net, **options)


@pytest.mark.parametrize("groups", [-1, "two", [["weight"]]])
def test_bad_groups(groups):
    if hvd.size() == 1:
        pytest.skip("one rank forms no groups")
    with pytest.raises(OptionError, match="groups"):
        sgd(model(), groups=groups)


def test_a_parameter_in_two_groups():
    if hvd.size() == 1:
        pytest.skip("one rank forms no groups")
    net = model()
    first = next(net.parameters())
    with pytest.raises(OptionError, match="two groups"):
        sgd(net, groups=[[first], [first]])


def test_different_shapes_on_ranks_name_both():
    if hvd.size() == 1:
        pytest.skip("one rank cannot differ from itself")
    net = model(width=40 + (hvd.rank() == hvd.size() - 1))
    with pytest.raises(
        MismatchError, match=r"'0.weight' \(40, 6\).* rank 0 and '0.weight' \(41, 6\)"
    ):
        sgd(net)


def test_different_names_on_ranks_name_both():
    if hvd.size() == 1:
        pytest.skip("one rank cannot differ from itself")
    net = model()
    named = [(f"{'x' if hvd.rank() else 'y'}.{name}", p) for name, p in net.named_parameters()]
    with pytest.raises(MismatchError, match=r"'y\.0\.weight'.*'x\.0\.weight'"):
        hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=1), named)


def test_diverged_replicas_are_found_and_named():
    if hvd.size() == 1:
        pytest.skip("one replica cannot diverge")
    net = model()
    optimizer = sgd(net)
    with torch.no_grad():
        net[2].bias[1] += hvd.rank()
    loss_of(net, *shard(0, 12 * hvd.size())).backward()
    with pytest.raises(ReplicaDivergenceError, match=r"first '2\.bias'"):
        optimizer.step()


def test_the_guard_can_be_turned_off():
    net = model(seed=hvd.rank())
    optimizer = sgd(net, guard=False)
    loss_of(net, *shard(0, 12 * hvd.size())).backward()
    optimizer.step()


def test_adasum():
    """Equal steps average to themselves, orthogonal ones add up."""
    size = hvd.size()
    if current().comm.name not in ("horovod", "serial") and size > 1:
        with pytest.raises(UnsupportedError, match=r"Adasum|power of two"):
            sgd(model(), op=hvd.Adasum)
        return
    if size & (size - 1):
        with pytest.raises(UnsupportedError, match="power of two"):
            sgd(model(), op=hvd.Adasum)
        return
    p = torch.nn.Parameter(torch.zeros(size + 1, dtype=torch.float64))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [("p", p)], op=hvd.Adasum)
    direction = torch.zeros(size + 1, dtype=torch.float64)
    direction[hvd.rank()] = 1.0
    (p * direction).sum().backward()
    optimizer.step()
    expected = -torch.ones(size + 1, dtype=torch.float64)
    expected[-1] = 0
    assert torch.allclose(p.detach(), expected)


# --- uneven numbers of batches ----------------------------------------------------------


def test_join_serves_the_ranks_that_go_on(small_buckets):
    """Rank r has r + 1 batches; those that are out of batches count as zero."""
    net = model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1), net.named_parameters(), guard=False
    )
    reference = model()
    for step in range(hvd.rank() + 1):
        optimizer.zero_grad()
        loss_of(net, *batch(step, 6, torch.float64)).backward()
        optimizer.step()
    last = hvd.join()
    own = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(hvd.size()):
        own.zero_grad()
        loss_of(reference, *batch(step, 6, torch.float64)).backward()
        active = hvd.size() - step
        for p in reference.parameters():
            p.grad.mul_(active / hvd.size())
        own.step()
        if step == hvd.rank():
            mine = [p.detach().clone() for p in reference.parameters()]
    assert last == hvd.size() - 1
    for p, q in zip(net.parameters(), mine, strict=True):
        assert torch.allclose(p, q, atol=1e-10)


# --- broadcasts of state ----------------------------------------------------------------


def test_broadcast_parameters_gives_all_ranks_the_roots():
    root = hvd.size() - 1
    net = model(seed=hvd.rank())
    hvd.broadcast_parameters(net.state_dict(), root_rank=root)
    assert furthest(net, model(seed=root)) == 0
    other = model(seed=hvd.rank())
    hvd.broadcast_parameters(list(other.parameters()), root_rank=root)
    assert furthest(other, model(seed=root)) == 0


def test_broadcast_parameters_refuses_other_shapes():
    if hvd.size() == 1:
        pytest.skip("one rank cannot differ from itself")
    with pytest.raises(MismatchError, match="different parameters"):
        hvd.broadcast_parameters(model(width=3 + hvd.rank()).state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_broadcast_optimizer_state_to_new_optimizers(name):
    net = model()
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    if hvd.rank() == 0:
        loss_of(net, *batch(0, 8, torch.float64)).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.123
    hvd.broadcast_parameters(net.state_dict())
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.param_groups[0]["lr"] == 0.123
    states = hvd.allgather_object(
        [
            [float(torch.as_tensor(v).double().sum()) for v in s.values() if v is not None]
            for s in optimizer.state_dict()["state"].values()
        ]
    )
    assert len(states[0]) == 6
    assert all(state == states[0] for state in states)


def test_epochs_of_uneven_length_with_the_guard_on():
    """After a join the ranks count calls and steps alike again, over every communicator."""
    net = model(seed=3)
    optimizer = sgd(net)
    for _ in range(3):
        for step in range(2 * hvd.rank() + 1):
            optimizer.zero_grad()
            loss_of(net, *batch(step, 6, torch.float64)).backward()
            optimizer.step()
            hvd.allreduce(torch.ones(1))
        last = hvd.join()
        hvd.broadcast_parameters(net.state_dict(), root_rank=last)
        hvd.broadcast_optimizer_state(optimizer, root_rank=last)
        assert float(hvd.allreduce(torch.ones(1), op=hvd.Sum)) == hvd.size()
        assert hvd.allgather_object(hvd.rank()) == list(range(hvd.size()))


# --- what a review found ----------------------------------------------------------------


def test_equal_models_with_different_compression_are_told_apart_after_a_join():
    nets = [model(torch.float32), model(torch.float32)]
    optimizers = [
        sgd(n, compression=c, guard=False) for n, c in zip(nets, ("none", "fp16"), strict=True)
    ]
    for step in range(hvd.rank() + 1):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(net, *batch(step, 6, torch.float32)).backward()
            optimizer.step()
    assert hvd.join() == hvd.size() - 1


def test_line_search_takes_the_same_branches_on_all_ranks(rows):
    net = model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe", max_iter=5),
        net.named_parameters(),
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, *shard(0, rows))
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


def test_parameters_thawed_after_wrapping_are_noticed():
    if hvd.size() == 1:
        pytest.skip("one replica cannot diverge")
    net = model()
    net[0].weight.requires_grad_(False)
    optimizer = sgd(net)
    net[0].weight.requires_grad_(True)
    loss_of(net, *shard(0, 12 * hvd.size())).backward()
    with pytest.raises(ReplicaDivergenceError, match=r"0\.weight"):
        optimizer.step()


def test_hooks_of_the_optimizer_run_once_a_step():
    net = model()
    optimizer = sgd(net)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(net, *shard(0, 12 * hvd.size())).backward()
        optimizer.step()
    assert len(calls) == 3


@pytest.mark.parametrize("compression", ["none", "topk:ratio=0.1"])
def test_an_optimizer_that_is_gone_leaves_nothing(compression, rows):
    """Neither its model nor its buckets, which training in the same process would add up."""
    group = hvd.global_process_set.group()

    def train() -> weakref.ref:
        net = model()
        optimizer = sgd(net, compression=unchecked([only("*", compression, min_bytes=0)]))
        for step in range(3):
            optimizer.zero_grad()
            loss_of(net, *shard(step, rows)).backward()
            optimizer.step()
        return weakref.ref(next(net.parameters()))

    gc.collect()
    before = len(group._reducers), len(getattr(group.comm, "_segments", ()))
    for _ in range(3):
        assert is_freed(train())
    assert (len(group._reducers), len(getattr(group.comm, "_segments", ()))) == before


def test_gradients_outlive_the_world():
    net = model()
    optimizer = sgd(net)
    loss_of(net, *shard(0, 12 * hvd.size())).backward()
    optimizer.step()
    before = [p.grad.clone() for p in net.parameters()]
    hvd.shutdown()
    assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before, strict=True))
    hvd.init()
    assert hvd.allgather_object(hvd.rank()) == list(range(hvd.size()))


def test_init_with_process_sets():
    several = hvd.size() > 1
    hvd.shutdown()
    part = hvd.ProcessSet([0])
    hvd.init(process_sets=[part] if several else None)
    assert hvd.global_process_set.ranks == list(range(hvd.size()))
    if several:
        assert part.included() == (hvd.rank() == 0)
        assert hvd.remove_process_set(part)
