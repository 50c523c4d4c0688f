"""SyncBatchNorm over ranks equals BatchNorm over all their samples."""

import pytest
import torch

import hpc_dl.torch as hvd


@pytest.fixture(autouse=True)
def _world():
    hvd.init()


def rows_of(rank: int) -> slice:
    """Give rank r the next r + 2 samples: ranks have different numbers of them."""
    start = sum(r + 2 for r in range(rank))
    return slice(start, start + rank + 2)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 2)])
def test_like_batch_norm_over_all_samples(shape, momentum):
    total = rows_of(hvd.size() - 1).stop
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(total, *shape, generator=generator, dtype=torch.float64) * 3 + 100
    grads = torch.randn(total, *shape, generator=generator, dtype=torch.float64)
    kind = {1: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm2d}[len(shape)]
    whole = kind(3, momentum=momentum).double()
    torch.nn.init.normal_(whole.weight, generator=generator)
    synced = hvd.SyncBatchNorm(3, momentum=momentum).double()
    synced.load_state_dict(whole.state_dict())
    x = data.clone().requires_grad_()
    mine = data[rows_of(hvd.rank())].clone().requires_grad_()
    for _ in range(2):
        expected, got = whole(x), synced(mine)
        assert torch.allclose(got, expected[rows_of(hvd.rank())], atol=1e-10)
    (expected * grads).sum().backward()
    (got * grads[rows_of(hvd.rank())]).sum().backward()
    assert torch.allclose(mine.grad, x.grad[rows_of(hvd.rank())], atol=1e-10)
    summed = hvd.allreduce(synced.weight.grad, op=hvd.Sum)
    assert torch.allclose(summed, whole.weight.grad, atol=1e-9)
    for name, buffer in whole.named_buffers():
        assert torch.allclose(dict(synced.named_buffers())[name], buffer, atol=1e-10)
    whole.eval()
    synced.eval()
    assert torch.allclose(synced(data), whole(data), atol=1e-8)


def test_conversion_of_a_model():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Sequential(torch.nn.BatchNorm1d(2)),
    )
    net[1].running_mean.fill_(3)
    converted = hvd.SyncBatchNorm.convert_sync_batchnorm(net)
    assert isinstance(converted[1], hvd.SyncBatchNorm)
    assert isinstance(converted[2][0], hvd.SyncBatchNorm)
    assert float(converted[1].running_mean[0]) == 3
    assert len(list(converted.parameters())) == len(list(net.parameters()))


def test_halves_are_summed_in_float32():
    layer = hvd.SyncBatchNorm(2).to(torch.bfloat16)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(hvd.rank())).to(torch.bfloat16)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert float(hvd.allreduce(out.detach().float().mean()).abs()) < 0.05


def test_too_few_dimensions():
    with pytest.raises(ValueError, match="2 dimensions"):
        hvd.SyncBatchNorm(3)(torch.zeros(3))
