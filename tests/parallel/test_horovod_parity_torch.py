"""Half precision gives what Horovod's own gives; true for any number of ranks and communicator."""

import numpy as np
import pytest
import torch
from torch_training import batch, furthest, loss_of, model

import hpc_dl.torch as hvd

horovod = pytest.importorskip("horovod.torch", reason="Horovod is not built for torch")

ROWS, STEPS = 24, 5


# Horovod's own names are numbers that count a rank's operations so far, which may differ after
# other tests: all of its operations here have names.
@pytest.fixture(autouse=True)
def _worlds():
    hvd.init()
    horovod.init()
    assert (horovod.rank(), horovod.size()) == (hvd.rank(), hvd.size())


def gradients(grid: bool) -> torch.Tensor:
    """Make this rank's values: any, or such that half precision adds them exactly."""
    generator = torch.Generator().manual_seed(horovod.rank())
    if grid:
        return torch.randint(-64, 64, (5000,), generator=generator).float() / 32
    return torch.randn(5000, generator=generator)


def optimizer_of(library, net, compression):
    """Wrap SGD; both have the same names."""
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return library.DistributedOptimizer(sgd, net.named_parameters(), compression=compression)


def test_an_all_reduce_of_what_adds_exactly_is_the_same() -> None:
    ours = hvd.allreduce(gradients(True), op=hvd.Sum, compression=hvd.Compression.fp16)
    theirs = horovod.allreduce(
        gradients(True), op=horovod.Sum, compression=horovod.Compression.fp16, name="parity.1"
    )
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_an_all_reduce_differs_by_the_rounding_of_the_sums() -> None:
    ours = hvd.allreduce(gradients(False), compression=hvd.Compression.fp16)
    theirs = horovod.allreduce(
        gradients(False), compression=horovod.Compression.fp16, name="parity.2"
    )
    # Horovod rounds after each of the size - 1 additions and after the division, we once.
    largest = horovod.allreduce(gradients(False).abs(), op=horovod.Sum, name="parity.3")
    bound = (horovod.size() + 1) * 2.0**-11 * largest
    assert (ours - theirs).abs().le(bound).all()


def test_bf16_is_an_all_reduce_of_what_is_cast() -> None:
    """Horovod has no such compressor, but reduces tensors of the type."""
    x = gradients(True)
    ours = hvd.allreduce(x, op=hvd.Sum, compression=hvd.Compression.bf16)
    theirs = horovod.allreduce(x.bfloat16().float(), op=horovod.Sum, name="parity.4")
    assert (ours - theirs).abs().le(2.0**-8 * theirs.abs()).all()


@pytest.mark.parametrize("spec", ["fp16", "none"])
def test_training_is_the_same(spec: str) -> None:
    nets = []
    for library in (hvd, horovod):
        net = model(torch.float32)
        optimizer = optimizer_of(library, net, getattr(library.Compression, spec))
        for step in range(STEPS):
            optimizer.zero_grad()
            x, y = batch(step, ROWS, torch.float32)
            mine = slice(library.rank(), None, library.size())
            loss_of(net, x[mine], y[mine]).backward()
            optimizer.step()
        nets.append(net)
    assert furthest(*nets) < (1e-3 if spec == "fp16" else 1e-5)
    assert furthest(nets[0], model(torch.float32)) > 0.01  # it has trained
