"""1-bit Adam and 1-bit LAMB of torch on real ranks; true for any number of them."""

import copy
import logging

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch_training import batch, equal_on_all_ranks, furthest, loss_of, model

import hpc_dl.torch as hvd
from hpc_dl.compress import unchecked
from hpc_dl.errors import OptionError, UnsupportedError
from hpc_dl.world import current

KINDS = {"adam": hvd.OneBitAdam, "lamb": hvd.OneBitLamb}


@pytest.fixture(autouse=True)
def _world():
    hvd.init()


@pytest.fixture
def rows() -> int:
    return 12 * hvd.size()


def shard(step: int, rows: int, dtype=torch.float64):
    x, y = batch(step, rows, dtype)
    return x[hvd.rank() :: hvd.size()], y[hvd.rank() :: hvd.size()]


def whole(step: int, rows: int, dtype=torch.float64):
    return batch(step, rows, dtype)


def train(net, optimizer, steps, rows, data=shard):
    dtype = next(net.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, *data(step, rows, dtype)).backward()
        optimizer.step()
    return net


def distributed(net, kind="adam", **options):
    own = KINDS[kind](net.parameters(), **{"lr": 0.01, "freeze_step": 5, **options})
    return hvd.DistributedOptimizer(own, net.named_parameters())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_before_the_freeze_it_is_adam(decay, rows):
    alone, adam = model(), model()
    reference = torch.optim.AdamW(adam.parameters(), lr=0.01, weight_decay=decay)
    train(adam, reference, range(6), rows, whole)
    own = hvd.OneBitAdam(alone.parameters(), lr=0.01, freeze_step=6, weight_decay=decay)
    assert furthest(train(alone, own, range(6), rows, whole), adam) <= 1e-12
    together = model()
    train(together, distributed(together, freeze_step=6, weight_decay=decay), range(6), rows)
    # Gradients travel as float32.
    assert furthest(together, adam) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [1, 2])
def test_n_ranks_train_like_one_with_the_whole_batch_after_the_freeze(kind, passes, rows):
    alone, together = model(), model()
    own = KINDS[kind](alone.parameters(), lr=0.01, freeze_step=3)
    train(alone, own, range(9), rows, whole)
    optimizer = distributed(together, kind, freeze_step=3, compression="none")
    optimizer.set_backward_passes_per_step(passes)
    for step in range(9):
        optimizer.zero_grad()
        x, y = shard(step, rows)
        for i in range(passes):
            (loss_of(together, x[i::passes], y[i::passes]) / passes).backward()
        optimizer.step()
    assert furthest(alone, together) <= 2e-4
    assert equal_on_all_ranks(together)


def test_the_variance_stays_after_the_freeze(rows):
    net = model()
    optimizer = distributed(net, freeze_step=3)
    p = next(net.parameters())
    train(net, optimizer, range(3), rows)
    before = optimizer.state[p]["exp_avg_sq"].clone()
    train(net, optimizer, range(3, 6), rows)
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], before)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_stay_equal_to_the_bit_and_far_less_is_sent(kind, rows):
    net = model(torch.float32, width=300)
    optimizer = distributed(net, kind, freeze_step=2)
    train(net, optimizer, range(2), rows)
    dense = optimizer.traffic().bytes_sent / 2
    train(net, optimizer, range(2, 12), rows)
    assert equal_on_all_ranks(net)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    compressed = (optimizer.traffic().bytes_sent - 2 * dense) / 10
    assert compressed <= dense / 25


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [2, 5, 8])
@pytest.mark.parametrize("compression_first", [False, True])
def test_resumes_exactly_before_and_after_the_freeze(kind, stop, compression_first, rows):
    straight, first = model(torch.float32), model(torch.float32)
    train(straight, distributed(straight, kind), range(11), rows)

    optimizer = distributed(first, kind)
    train(first, optimizer, range(stop), rows)
    weights, state = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    compression = optimizer.compression_state()

    second = model(torch.float32, seed=8)
    optimizer = distributed(second, kind)
    second.load_state_dict(weights)
    if compression_first:
        optimizer.load_compression_state(compression)
    optimizer.load_state_dict(state)
    if not compression_first:
        optimizer.load_compression_state(compression)
    train(second, optimizer, range(stop, 11), rows)
    assert furthest(straight, second) == 0


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_the_state_of_the_optimizer_alone_begins_no_new_warm_up(wrapped_first, rows):
    options = {"freeze_step": 3, "compression": "none"}
    straight, first, second = model(), model(), model(seed=8)
    train(straight, distributed(straight, **options), range(10), rows)
    optimizer = distributed(first, **options)
    train(first, optimizer, range(6), rows)

    second.load_state_dict(first.state_dict())
    own = hvd.OneBitAdam(second.parameters(), lr=0.01, **options)
    state = copy.deepcopy(optimizer.state_dict())
    if wrapped_first:
        own = hvd.DistributedOptimizer(own, second.named_parameters())
        own.load_state_dict(state)
    else:
        own.load_state_dict(state)
        own = hvd.DistributedOptimizer(own, second.named_parameters())
    train(second, own, range(6, 10), rows)
    assert furthest(straight, second) <= 1e-6


def test_a_broadcast_of_the_optimizer_state_is_a_resume(rows):
    options = {"freeze_step": 3, "compression": "none"}
    straight, second = model(), model(seed=8)
    optimizer = distributed(straight, **options)
    train(straight, optimizer, range(6), rows)
    other = distributed(second, **options)
    if hvd.rank() == 0:
        second.load_state_dict(straight.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    hvd.broadcast_parameters(second.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(other, root_rank=0)
    train(straight, optimizer, range(6, 10), rows)
    train(second, other, range(6, 10), rows)
    assert furthest(straight, second) <= 1e-6
    assert equal_on_all_ranks(second)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_step_that_a_scaler_skips_counts_neither_here_nor_there(at, rows):
    """Steps 1, 2 and 3 are before, at and after the freeze."""
    net, reference = model(torch.float32), model(torch.float32)
    options = {"freeze_step": 2, "compression": "none"}
    optimizer, other = distributed(net, **options), distributed(reference, **options)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=8.0, growth_interval=10**6, backoff_factor=0.99999
    )
    for step in range(8):
        optimizer.zero_grad()
        loss = loss_of(net, *shard(step, rows, torch.float32))
        # On one rank only: the others learn of it from what they are sent.
        overflows = step == at and hvd.rank() == hvd.size() - 1
        scaler.scale(loss * float("inf") if overflows else loss).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
    assert optimizer.steps == 7
    train(reference, other, [s for s in range(8) if s != at], rows)
    # The momentum was taken on another scale until then, by a hundred thousandth.
    assert furthest(net, reference) <= 1e-4
    assert equal_on_all_ranks(net)


def _digits(optimizer_of, seed):
    """Return the accuracy, and the weights' largest magnitude, after some epochs."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    learn, test = order[:-360], order[-360:]
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = hvd.DistributedOptimizer(optimizer_of(net.parameters()), net.named_parameters())
    for _ in range(10):
        shuffled = random.permutation(learn)
        for begin in range(0, len(shuffled) - 59, 60):
            mine = shuffled[begin : begin + 60][hvd.rank() :: hvd.size()]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images[mine]), labels[mine]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((net(images[test]).argmax(1) == labels[test]).float().mean())


def test_digits_are_learnt_as_well_as_by_adam():
    """Some of their pixels are nearly always zero: without a floor 1-bit Adam diverges."""
    adam = np.mean([_digits(lambda p: torch.optim.Adam(p, lr=1e-2), s) for s in (0, 2)])
    for kind, lr in (("adam", 1e-2), ("lamb", 2e-2)):
        make = KINDS[kind]
        found = [_digits(lambda p: make(p, lr=lr, freeze_step=60), s) for s in (0, 2)]  # noqa: B023
        # The accuracy of one network differs by about a hundredth from seed to seed.
        assert np.mean(found) >= adam - 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_a_deviation_near_zero_makes_no_enormous_step(kind):
    """A compressor gives all entries of a block the same momentum."""
    net = model(torch.float32)
    optimizer = distributed(net, kind, freeze_step=3, lr=1e-3)
    for step in range(20):
        x, y = shard(step, 12 * hvd.size(), torch.float32)
        x[:, 0] *= 1e-6
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        before = net[0].weight.detach().clone()
        optimizer.step()
        assert (net[0].weight - before).abs().max() <= 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_without_elements_is_left_alone(kind, rows):
    net = model(torch.float32)
    net.register_parameter("nothing", torch.nn.Parameter(torch.zeros(0, 3)))
    optimizer = distributed(net, kind, freeze_step=2)
    for step in range(4):
        optimizer.zero_grad()
        (loss_of(net, *shard(step, rows, torch.float32)) + net.nothing.sum()).backward()
        optimizer.step()
    assert net.nothing.shape == (0, 3)
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_loading_the_optimizers_state_alone_is_no_loss_of_momentum(caplog, rows):
    net = model(torch.float32)
    optimizer = distributed(net, freeze_step=2, compression="none")
    train(net, optimizer, range(4), rows)
    with caplog.at_level(logging.WARNING, "hpc_dl"):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert "dropped" not in caplog.text


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_what_had_no_gradient_in_the_warm_up(floor, caplog):
    net = model(torch.float32)
    unused = torch.nn.Parameter(torch.ones(4))
    named = [*net.named_parameters(), ("unused", unused)]
    own = hvd.OneBitAdam([p for _, p in named], lr=0.01, freeze_step=2, floor=floor)
    optimizer = hvd.DistributedOptimizer(own, named)
    with torch.no_grad():
        net[0].weight[:, 0] = 0.5
    with caplog.at_level(logging.WARNING, "hpc_dl"):
        for step in range(6):
            x, y = shard(step, 12 * hvd.size(), torch.float32)
            x[:, 0] = 0 if step < 2 else 1
            optimizer.zero_grad()
            loss_of(net, x, y).backward()
            optimizer.step()
    # Parts of a parameter learn later if there is a floor; one without any gradient does not.
    assert (net[0].weight[:, 0] == 0.5).all() == (floor == 0)
    assert (unused == 1).all()
    assert "1 parameters have had no gradient in the 2 steps" in caplog.text


def _embedding(**options):
    table = torch.nn.Embedding(10, 4, sparse=True)
    with torch.no_grad():
        table.weight.copy_(torch.arange(40.0).reshape(10, 4))
    own = hvd.OneBitAdam(table.parameters(), lr=0.1, freeze_step=2, compression="none")
    optimizer = hvd.DistributedOptimizer(own, table.named_parameters(), **options)
    for step in range(5):
        optimizer.zero_grad()
        table(torch.tensor([step % 3, 1 + hvd.rank()])).square().mean().backward()
        optimizer.step()
    return table


def test_sparse_gradients_are_refused_unless_they_travel_as_dense_ones():
    with pytest.raises(UnsupportedError, match="sparse_as_dense=True"):
        _embedding()
    weights = _embedding(sparse_as_dense=True).weight.detach()
    assert not torch.equal(weights[:3], torch.arange(12.0).reshape(3, 4))
    assert torch.equal(weights[7:], torch.arange(28.0, 40.0).reshape(3, 4))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compression": "onebit"}, "brings its compression along"),
        ({"compression": hvd.Compression.fp16}, "brings its compression along"),
        ({"op": hvd.Sum}, "needs averages"),
        ({"gradient_predivide_factor": 2.0}, "needs averages"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(options, said):
    own = hvd.OneBitAdam(model().parameters(), freeze_step=5)
    with pytest.raises(OptionError, match=said):
        hvd.DistributedOptimizer(own, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"freeze_step": 0}, "freeze_step=0"),
        ({"freeze_step": 5, "lr": -1}, "lr=-1"),
        ({"freeze_step": 5, "betas": (0.0, 0.9)}, "betas"),
        ({"freeze_step": 5, "compression": "auto"}, "'auto'"),
    ],
)
def test_bad_options_of_its_own(options, said):
    with pytest.raises(OptionError, match=said):
        hvd.OneBitAdam(model().parameters(), **options)


def test_groups_share_the_beta_of_momentum_and_come_before_the_first_step(rows):
    net = model()
    first, *others = net.parameters()
    groups = [{"params": [first], "betas": (0.8, 0.9)}, {"params": others}]
    with pytest.raises(OptionError, match="one for all"):
        hvd.OneBitAdam(groups, freeze_step=5)
    optimizer = distributed(net)
    train(net, optimizer, range(1), rows)
    with pytest.raises(OptionError, match="before the first"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize(
    ("make", "compression"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "dgc"),
        (lambda p: torch.optim.SGD([{"params": p, "momentum": 0.5}], lr=0.1), "topk:momentum=0.9"),
        (torch.optim.Adam, "onebit"),
        (torch.optim.NAdam, "dgc"),
        (torch.optim.RMSprop, "demo"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "topk:error_feedback=off"),
    ],
)
def test_pairs_that_do_not_converge_are_refused_on_any_number_of_ranks(make, compression):
    net = model()
    optimizer = make(list(net.parameters()))
    with pytest.raises(OptionError, match="unchecked"):
        hvd.DistributedOptimizer(optimizer, compression=compression)
    hvd.DistributedOptimizer(optimizer, compression=unchecked(compression))


def test_rank_0_warns_once_of_error_feedback_with_adam(caplog):
    net = model()
    with caplog.at_level(logging.WARNING, "hpc_dl.compress"):
        for _ in range(2):
            adam = torch.optim.RAdam(net.parameters())
            hvd.DistributedOptimizer(adam, compression="powersgd:rank=1")
    said = sum("RAdam is not" in record.message for record in caplog.records)
    assert said == (current().comm.rank == 0)


def test_groups_that_are_added_must_share_the_first_beta():
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    optimizer = hvd.OneBitAdam(first.parameters(), freeze_step=2)
    optimizer = hvd.DistributedOptimizer(optimizer)
    with pytest.raises(OptionError, match="first betas"):
        optimizer.add_param_group({"params": list(second.parameters()), "betas": (0.5, 0.9)})
    with pytest.raises(OptionError, match="eps"):
        optimizer.add_param_group({"params": list(second.parameters()), "eps": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", [hvd.OneBitAdam, hvd.OneBitLamb])
def test_an_option_that_there_is_not_is_refused(kind):
    with pytest.raises(TypeError, match="beta_one"):
        kind(torch.nn.Linear(3, 2).parameters(), freeze_step=2, beta_one=0.9)
