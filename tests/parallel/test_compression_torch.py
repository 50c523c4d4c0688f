"""Compressed gradients in torch on real ranks; true for any number of them."""

import numpy as np
import pytest
import torch

import hpc_dl.torch as hvd
import hpc_dl.torch.gradients as gradients
from hpc_dl.compress import Auto, Limits, error_feedback, make, only, policy_of, unchecked
from hpc_dl.errors import MismatchError, OptionError
from hpc_dl.reduce import reshard
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
    mine = torch.from_numpy(weights(net))
    for other in hvd.allgather(mine[None]):
        assert torch.equal(mine, other)
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
    np.testing.assert_array_equal(weights(warm), weights(dense))
    take(warm, optimizer, [3])
    owed = [saved["residual"].any() for saved in optimizer.compression_state().values()]
    assert hvd.size() == 1 or any(owed)


def test_a_cast_by_name_is_horovods_cast():
    by_name, by_class = network(), network()
    take(by_name, wrapped(by_name, "fp16"), range(3))
    take(by_class, wrapped(by_class, hvd.Compression.fp16), range(3))
    np.testing.assert_array_equal(weights(by_name), weights(by_class))


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
    np.testing.assert_array_equal(weights(later), weights(through))


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
    take(net, optimizer, range(12))
    if hvd.size() > 1:
        chosen = optimizer._reduction._policy.describe()
        assert len(set(hvd.allgather_object(chosen))) == 1
        assert optimizer._reduction._chooser is None
    mine = torch.from_numpy(weights(net))
    for other in hvd.allgather(mine[None]):
        assert torch.equal(mine, other)


def test_auto_takes_what_it_predicts_to_be_fastest(monkeypatch):
    """On a slow network, and with more to send than it can hide, it compresses."""
    from hpc_dl.reduce import choose, cost

    slow = cost.network_of_link(max(hvd.size(), 2), bandwidth=1e6, latency=1e-4)
    monkeypatch.setattr(choose, "measure_network", lambda comm: slow)
    net = network()
    optimizer = wrapped(net, Auto(candidates=("none", "fp16", "onebit"), steps=3))
    take(net, optimizer, range(8))
    if hvd.size() > 1:
        assert "onebit" in optimizer._reduction._policy.describe()


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
        np.testing.assert_array_equal(weights(net), weights(named))
