"""Compressed gradients in torch on real ranks; true for any number of them."""

import copy

import numpy as np
import pytest
import torch
from same_training import assert_same_training
from stub_chooser import let_auto_choose
from torch_training import equal_on_all_ranks, furthest, train_sharded

import hpc_dl.torch as hvd
import hpc_dl.torch.gradients as gradients
from hpc_dl.compress import Auto, Limits, error_feedback, make, only, policy_of, unchecked
from hpc_dl.data import digits
from hpc_dl.errors import MismatchError, OptionError
from hpc_dl.observe import Run
from hpc_dl.reduce import reshard
from hpc_dl.testing.same import assert_same_bytes
from hpc_dl.training import Plan
from hpc_dl.training.classify_torch import Learner, fit
from hpc_dl.world import current

SPECS = (
    "bf16:error_feedback=fp32",
    "fp8",
    "int8",
    "int4",
    "qsgd",
    "terngrad",
    "natural",
    "signsgd",
    "onebit",
    "onebit:error_feedback=int8",
    "topk:ratio=0.05",
    "topk:ratio=0.9",
    "threshold:value=0.01",
    "randomk:ratio=0.1",
    "dgc:ratio=0.05",
    "powersgd:rank=2",
    "sketch",
    "demo",
)
ROWS, COLUMNS = 160, 130


@pytest.fixture(autouse=True)
def _world():
    hvd.init()


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(ROWS, COLUMNS), torch.nn.Tanh(), torch.nn.Linear(COLUMNS, ROWS)
    )


def loss_of(net: torch.nn.Module, step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(8, ROWS, generator=generator)
    return (net(x) - 0.5 * x).square().mean()


def wrapped(net, compression, lr=1.0, **options):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    return hvd.DistributedOptimizer(
        optimizer, net.named_parameters(), compression=compression, **options
    )


def take(net, optimizer, steps) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step, hvd.rank()).backward()
        optimizer.step()


def weights(net) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).numpy().copy()


def averaged(net, step: int) -> list[torch.Tensor]:
    """Return the mean over the ranks of the gradients of a step, computed on this rank alone."""
    loss = sum(loss_of(net, step, rank) for rank in range(hvd.size())) / hvd.size()
    return list(torch.autograd.grad(loss, list(net.parameters())))


@pytest.mark.parametrize("spec", SPECS)
def test_replicas_stay_equal_and_learn(spec):
    net = network()
    rate = 0.001 if spec == "signsgd" else 1.0
    optimizer = wrapped(net, unchecked(spec), rate)
    with torch.no_grad():
        before = float(loss_of(net, 99, 0))
    take(net, optimizer, range(30))
    with torch.no_grad():
        after = float(loss_of(net, 99, 0))
    assert equal_on_all_ranks(net)
    assert after < before


@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.05", "powersgd:rank=2", "int8"])
def test_bytes_on_the_wire_are_counted(spec):
    net = network()
    optimizer = wrapped(net, policy_of([only("*", spec, min_bytes=0, min_ndim=0)]))
    take(net, optimizer, range(4))
    traffic = optimizer.traffic()
    if hvd.size() == 1:
        assert traffic.bytes_sent == traffic.bytes_dense == 0
        return
    share = 2 * (hvd.size() - 1) / hvd.size()
    elements = sum(p.numel() for p in net.parameters())
    assert traffic.steps == 4
    assert traffic.bytes_dense == pytest.approx(4 * share * 4 * elements, rel=1e-3)
    least = {"onebit": 25, "topk:ratio=0.05": 6, "powersgd:rank=2": 8, "int8": 3.5}[spec]
    assert traffic.bytes_dense / traffic.bytes_sent > least / max(1, hvd.size() / 2)


def test_small_and_one_dimensional_parameters_stay_exact():
    net = network()
    optimizer = wrapped(net, "onebit", lr=0.0)
    expected = averaged(net, 0)
    take(net, optimizer, [0])
    for (name, p), mean in zip(net.named_parameters(), expected, strict=True):
        exact = torch.allclose(p.grad, mean, rtol=1e-4, atol=1e-7)
        assert exact == (name.endswith("bias") or hvd.size() == 1)


def test_rules_choose_for_each_parameter():
    net = network()
    rules = [("0.weight", "topk:ratio=0.01"), only("2.*", "none"), ("*", "onebit")]
    optimizer = wrapped(net, rules, lr=0.0)
    expected = averaged(net, 0)
    take(net, optimizer, [0])
    found = dict(net.named_parameters())
    torch.testing.assert_close(found["2.weight"].grad, expected[2], rtol=1e-4, atol=1e-7)
    sent = int((found["0.weight"].grad != 0).sum())
    most = round(0.01 * found["0.weight"].numel()) * hvd.size()
    assert hvd.size() == 1 or 0 < sent <= most


def test_warm_up_is_the_dense_control_to_the_bit():
    dense, warm = network(), network()
    take(dense, wrapped(dense, "none"), range(3))
    optimizer = wrapped(warm, "topk:ratio=0.01,warmup=3")
    take(warm, optimizer, range(3))
    assert_same_training([weights(warm)], [weights(dense)])
    take(warm, optimizer, [3])
    owed = [saved["residual"].any() for saved in optimizer.compression_state().values()]
    assert hvd.size() == 1 or any(owed)


def test_a_cast_by_name_is_horovods_cast():
    by_name, by_class = network(), network()
    take(by_name, wrapped(by_name, "fp16"), range(3))
    take(by_class, wrapped(by_class, hvd.Compression.fp16), range(3))
    assert_same_training([weights(by_name)], [weights(by_class)])


@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.05", "powersgd:rank=2"])
def test_accumulated_gradients_are_compressed_once(spec):
    once, twice = network(), network()
    take(once, wrapped(once, spec, lr=0.5), range(1))
    optimizer = wrapped(twice, spec, lr=0.5, backward_passes_per_step=2)
    for _ in range(2):
        (loss_of(twice, 0, hvd.rank()) / 2).backward()
    optimizer.step()
    assert optimizer.traffic().steps == (1 if hvd.size() > 1 else 0)
    np.testing.assert_allclose(weights(twice), weights(once), rtol=1e-4, atol=1e-5)


def test_the_sum_is_the_average_times_the_ranks():
    average, total = network(), network()
    take(average, wrapped(average, "onebit", lr=0.5), range(2))
    take(total, wrapped(total, "onebit", lr=0.5 / hvd.size(), op=hvd.Sum), range(2))
    np.testing.assert_allclose(weights(total), weights(average), rtol=1e-4, atol=1e-6)


def test_gradients_that_are_not_finite_are_so_on_all_ranks_and_then_forgotten():
    net = network()
    optimizer = wrapped(net, "onebit", lr=0.0)
    take(net, optimizer, [0])
    loss = loss_of(net, 1, hvd.rank())
    (loss * (float("nan") if hvd.rank() == hvd.size() - 1 else 1.0)).backward()
    optimizer.step()
    assert not torch.isfinite(next(net.parameters()).grad).any()
    with torch.no_grad():
        for p, q in zip(net.parameters(), network().parameters(), strict=True):
            p.copy_(q)  # 0 times NaN
    take(net, optimizer, [2])
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.05", "powersgd:rank=2", "dgc:ratio=0.1"])
def test_a_run_that_is_resumed_ends_with_the_same_bits(spec):
    through, halves = network(), network()
    take(through, wrapped(through, spec), range(6))
    first = wrapped(halves, spec)
    take(halves, first, range(3))
    later = network()
    later.load_state_dict(halves.state_dict())
    second = wrapped(later, spec)
    second.load_compression_state(first.compression_state())
    take(later, second, range(3, 6))
    assert_same_training([weights(later)], [weights(through)])


@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.05"])
def test_what_is_owed_survives_a_change_of_the_number_of_ranks(spec):
    net = network()
    optimizer = wrapped(net, spec)
    take(net, optimizer, range(3))
    states = hvd.allgather_object(optimizer.compression_state())
    merged = reshard(states)
    if hvd.size() == 1:
        assert merged == {}
        return
    for name in merged:
        residuals = [state[name]["residual"] for state in states]
        np.testing.assert_allclose(merged[name]["residual"], np.mean(residuals, 0), rtol=1e-6)
        servers = [state[name]["server"] for state in states]
        np.testing.assert_allclose(merged[name]["server"], np.sum(servers, 0), rtol=1e-6)
    resumed = network()
    optimizer = wrapped(resumed, spec)
    optimizer.load_compression_state(merged)
    take(resumed, optimizer, [3])


def test_ranks_with_different_compression_are_told():
    if hvd.size() == 1:
        return
    net = network()
    with pytest.raises(MismatchError, match=r"topk|onebit"):
        wrapped(net, "onebit" if hvd.rank() else "topk:ratio=0.01")


@pytest.mark.parametrize("op", [hvd.Max, hvd.Product])
def test_only_means_and_sums_are_compressed(op):
    with pytest.raises(OptionError, match="Average or Sum"):
        wrapped(network(), "onebit", op=op)


def test_auto_chooses_alike_and_trains():
    net = network()
    auto = Auto(candidates=("none", "fp16", "onebit"), steps=4)
    optimizer = wrapped(net, auto)
    take(net, optimizer, range(30))
    if hvd.size() > 1:
        chosen = optimizer._reduction._compression.policy.describe()
        assert len(set(hvd.allgather_object(chosen))) == 1
        assert not optimizer._reduction._compression.deciding
    assert equal_on_all_ranks(net)


def test_a_run_that_is_resumed_goes_on_with_what_auto_chose(monkeypatch):
    let_auto_choose(monkeypatch, lambda: [policy_of("onebit")], every=3)
    auto = Auto(candidates=("none", "fp16", "onebit"), steps=3)
    net, later = network(), network()
    optimizer = wrapped(net, auto)
    take(net, optimizer, range(6))
    later.load_state_dict(net.state_dict())
    resumed = wrapped(later, auto)
    resumed.load_compression_state(optimizer.compression_state())
    take(later, resumed, range(6, 9))
    take(net, optimizer, range(6, 9))
    assert_same_training([weights(later)], [weights(net)])
    if hvd.size() > 1:
        done = resumed.traffic()
        assert 8 * done.bytes_sent < done.bytes_dense


def test_a_state_with_a_choice_that_only_one_rank_has_is_an_error_everywhere(monkeypatch):
    if hvd.size() == 1:
        return
    let_auto_choose(monkeypatch, lambda: [policy_of("onebit")], every=2)
    auto = Auto(candidates=("none", "onebit"), steps=2)
    net, later = network(), network()
    optimizer = wrapped(net, auto)
    take(net, optimizer, range(3))
    resumed = wrapped(later, auto)
    if hvd.rank() == 0:
        resumed.load_compression_state(optimizer.compression_state())
    with pytest.raises(MismatchError, match="onebit"):
        take(later, resumed, [3])


def test_nothing_is_lost_when_auto_changes_its_mind(monkeypatch):
    """With a learning rate of 0 gradients are what the weights say, and their sum is known."""
    specs = ["onebit", "powersgd:rank=2", "topk:ratio=0.05", "none"]
    let_auto_choose(monkeypatch, lambda: [policy_of(spec) for spec in specs])
    net = network()
    optimizer = wrapped(net, Auto(candidates=("none",)), lr=0.0)
    sums = [torch.zeros_like(p) for p in net.parameters()]
    for step in range(len(specs) + 1):
        take(net, optimizer, [step])
        for total, p in zip(sums, net.parameters(), strict=True):
            total += p.grad
    for number, total in enumerate(sums):
        given = sum(averaged(net, step)[number] for step in range(len(specs) + 1))
        torch.testing.assert_close(total, given, rtol=1e-3, atol=1e-5)


def test_loading_the_optimizers_state_alone_drops_what_is_owed(caplog):
    net = network()
    optimizer = wrapped(net, "onebit")
    take(net, optimizer, range(2))
    own, compressed = optimizer.state_dict(), optimizer.compression_state()
    take(net, optimizer, [2])
    with caplog.at_level("WARNING", "hpc_dl"):
        optimizer.load_state_dict(own)
    assert ("dropped" in caplog.text) == (hvd.size() > 1)
    for state in optimizer.compression_state().values():
        assert not state["residual"].any()
        assert not state["server"].any()
    caplog.clear()
    with caplog.at_level("WARNING", "hpc_dl"):
        take(net, optimizer, [3])
        optimizer.load_compression_state(compressed)
        optimizer.load_state_dict(own)  # in any order
    assert caplog.text == ""
    for name, state in optimizer.compression_state().items():
        assert_same_bytes(state["residual"], compressed[name]["residual"])


def test_a_state_of_another_model_is_refused():
    optimizer = wrapped(network(), "onebit")
    state = {"hidden.weight": {"residual": np.zeros(6, np.float32)}}
    if hvd.size() > 1:
        with pytest.raises(OptionError, match=r"'hidden\.weight'.*same model"):
            optimizer.load_compression_state(state)


def test_a_state_that_nobody_uses_is_told_of(caplog):
    class Own(hvd.Compressor):
        """A class of the user's own, with Horovod's interface."""

    optimizer = wrapped(network(), Own)
    state = {"0.weight": {"residual": np.ones(ROWS * COLUMNS, np.float32)}}
    with caplog.at_level("WARNING", "hpc_dl"):
        optimizer.load_compression_state(state)
    assert "compresses nothing" in caplog.text


def test_parameters_that_are_added_are_checked_too():
    first, second = network(), torch.nn.Linear(3, 2)
    optimizer = wrapped(first, "dgc:ratio=0.1")
    with pytest.raises(OptionError, match=r"momentum=0\.9"):
        optimizer.add_param_group({"params": list(second.parameters()), "momentum": 0.9})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": list(second.parameters())})
    assert len(optimizer.param_groups) == 2


def owed_together(optimizer, name) -> torch.Tensor:
    """Return what the ranks owe of the average of a parameter's gradients."""
    state = optimizer.compression_state()[name]
    owed = state["residual"] + hvd.size() * state.get("server", 0)
    return hvd.allreduce(torch.from_numpy(owed), op=hvd.Average)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.9", "powersgd:rank=2"])
def test_adding_parameters_loses_nothing(spec, between):
    """Also where they are added between backward and step, which forgets the gradients."""
    if hvd.size() == 1:
        return
    net, later = network(), torch.nn.Linear(COLUMNS, ROWS)
    optimizer = torch.optim.SGD([net[0].weight, net[2].weight], lr=0.0)
    named = [("0.weight", net[0].weight), ("2.weight", net[2].weight)]
    optimizer = hvd.DistributedOptimizer(optimizer, named, compression=spec)
    given, out = (torch.zeros(ROWS * COLUMNS) for _ in range(2))

    def step(number):
        nonlocal given, out
        given += averaged(net, number)[0].flatten()
        net.zero_grad()
        loss_of(net, number, hvd.rank()).backward()
        optimizer.step()
        out += net[0].weight.grad.flatten()

    for number in range(4):
        step(number)
    before = optimizer.traffic()
    if between:
        given += averaged(net, 9)[0].flatten()
        net.zero_grad()
        loss_of(net, 9, hvd.rank()).backward()
    optimizer.add_param_group({"params": [later.weight]})
    if between:
        out += net[0].weight.grad.flatten()  # it was reduced before it was forgotten
    torch.testing.assert_close(out + owed_together(optimizer, "0.weight"), given)
    for number in range(4, 6):
        step(number)
    torch.testing.assert_close(out + owed_together(optimizer, "0.weight"), given)
    after = optimizer.traffic()
    assert before.steps == 4
    assert after.steps == 6 + between
    assert after.bytes_sent > before.bytes_sent > 0


@pytest.mark.parametrize("broadcast", [False, True])
def test_a_state_that_is_loaded_within_a_step_ends_the_step(broadcast, monkeypatch):
    """What was on its way is waited for, and the next step is as if it had never been."""
    monkeypatch.setattr("hpc_dl.reduce.reducer.OVERLAP_BYTES", 0)
    net = network()
    optimizer = wrapped(net, "onebit")
    take(net, optimizer, range(2))
    own = copy.deepcopy(optimizer.state_dict())
    loss_of(net, 2, hvd.rank()).backward()
    if broadcast:
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    else:
        optimizer.load_state_dict(own)
    for state in optimizer.compression_state().values():
        assert not state["residual"].any()
        assert not state["server"].any()
    optimizer.zero_grad()
    take(net, optimizer, range(3, 5))
    assert equal_on_all_ranks(net)


@pytest.mark.parametrize("spec", ["onebit:warmup=3", "randomk:ratio=0.1"])
def test_a_state_that_only_one_rank_has_is_an_error_everywhere(spec):
    if hvd.size() == 1 or current().comm.negotiates:
        return
    net, later = network(), network()
    optimizer = wrapped(net, spec)
    take(net, optimizer, range(3))
    resumed = wrapped(later, spec)
    if hvd.rank() == 0:
        resumed.load_compression_state(optimizer.compression_state())
    with pytest.raises(MismatchError, match=r"states of compression.*step 3"):
        take(later, resumed, [3])


def test_compression_is_suspended_on_the_same_step_everywhere(caplog):
    net = network()
    policy = policy_of("onebit")._replace(limits=Limits(every=2, max_residual=1e-6, pause=3))
    optimizer = wrapped(net, policy)
    with caplog.at_level("WARNING"):
        take(net, optimizer, range(2))
        state = optimizer.compression_state()
        take(net, optimizer, [2])
    if hvd.size() == 1:
        return
    assert any(saved["residual"].any() for saved in state.values())
    later = optimizer.compression_state()
    assert not any(saved["residual"].any() or saved["server"].any() for saved in later.values())
    suspended = "suspended" in caplog.text
    assert suspended == (hvd.rank() == 0)


def test_ranks_that_have_joined_take_part(monkeypatch):
    if current().comm.negotiates:
        pytest.skip("Horovod serves only all-reduce after join()")
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 4096)
    net = network()
    optimizer = wrapped(net, "onebit", lr=0.1, guard=False)
    take(net, optimizer, range(2 + hvd.rank()))
    assert hvd.join() == hvd.size() - 1


def test_objects_and_mappings_are_as_good_as_names():
    for compression in (
        {"name": "topk", "ratio": 0.05, "error_feedback": "bf16"},
        make("topk:ratio=0.05,error_feedback=bf16"),
        error_feedback(make("topk:ratio=0.05").compressor, residual="bf16"),
    ):
        net, named = network(), network()
        take(net, wrapped(net, compression), range(3))
        take(named, wrapped(named, "topk:ratio=0.05,error_feedback=bf16"), range(3))
        assert_same_training([weights(net)], [weights(named)])


def test_the_loop_of_jobs_tells_the_guard_the_loss():
    data = digits()
    plan = Plan(data.train, None, hvd.rank(), hvd.size(), 2, 8, seed=0, most_steps=11)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10))
    net(torch.from_numpy(next(plan.training_batches(0)).images))
    optimizer, told = wrapped(net, "onebit", lr=0.01), []
    optimizer.report_loss = told.append
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    learner = Learner(net, optimizer, schedule, torch.nn.functional.cross_entropy)
    with Run(None, plan.epochs, plan.steps) as run:
        fit(learner, plan, run)
    assert len(told) == 4  # of steps 0 and 10 of each epoch
    assert all(0 < loss < 10 for loss in told)


def steps_of(optimizer) -> set[int]:
    return {int(state["step"]) for state in optimizer.compression_state().values()}


@pytest.mark.parametrize("spec", ["onebit", "powersgd:rank=2", "randomk:ratio=0.1"])
def test_all_ranks_go_on_after_a_join(spec):
    """Over Horovod ranks that run out of batches cannot compress; all of them together can."""
    uneven = 0 if current().comm.negotiates else hvd.rank()
    net = network()
    optimizer = wrapped(net, spec, lr=0.1, guard=False)
    take(net, optimizer, range(2 + uneven))
    last = hvd.join()
    hvd.broadcast_parameters(net.state_dict(), root_rank=last)
    take(net, optimizer, range(5, 8))
    assert equal_on_all_ranks(net)
    if hvd.size() > 1:
        assert len(set(map(tuple, hvd.allgather_object(sorted(steps_of(optimizer)))))) == 1


def test_casts_are_served_after_a_join_over_every_communicator():
    net = network()
    optimizer = wrapped(net, "fp16", lr=0.1, guard=False)
    take(net, optimizer, range(2 + hvd.rank()))
    last = hvd.join()
    hvd.broadcast_parameters(net.state_dict(), root_rank=last)
    take(net, optimizer, range(5, 7))
    assert equal_on_all_ranks(net)


@pytest.mark.parametrize("spec", ["dgc:momentum=0.9", "topk:momentum=0.9"])
def test_gradients_too_small_to_be_compressed_have_momentum_all_the_same(spec):
    """Also on one rank: the optimizer has none."""

    def train(momentum, **options):
        def sgd(parameters):
            return torch.optim.SGD(parameters, lr=0.05, momentum=momentum)

        return train_sharded(sgd, 6, 24, torch.float32, **options)

    assert furthest(train(0.0, compression=spec), train(0.9)) < 1e-5
    assert furthest(train(0.0), train(0.9)) > 1e-2
