"""Train a small torch model on shards of one batch, or on the whole of it: shared by tests."""

from collections.abc import Callable

import torch

import hpc_dl.torch as hvd

Maker = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Maker] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
}


def model(
    dtype: torch.dtype = torch.float64, width: int = 40, seed: int = 7
) -> torch.nn.Sequential:
    """Make a model whose initial parameters depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    layers = torch.nn.Sequential(
        torch.nn.Linear(6, width),
        torch.nn.Tanh(),
        torch.nn.Linear(width, width),
        torch.nn.Tanh(),
        torch.nn.Linear(width, 3),
    ).to(dtype)
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return layers


def batch(step: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the whole batch of a step: inputs (rows, 6) and targets (rows, 3)."""
    generator = torch.Generator().manual_seed(1000 + step)
    return (
        torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(rows, 3, generator=generator, dtype=torch.float64).to(dtype),
    )


def loss_of(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error."""
    return (net(x) - y).square().mean()


def train_alone(make: Maker, steps: int, rows: int, dtype: torch.dtype) -> torch.nn.Module:
    """Train on whole batches, without hpc_dl."""
    net = model(dtype)
    optimizer = make(list(net.parameters()))
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(net, *batch(step, rows, dtype)).backward()
        optimizer.step()
    return net


def train_sharded(
    make: Maker,
    steps: int,
    rows: int,
    dtype: torch.dtype,
    set_to_none: bool = True,
    **options: object,
) -> torch.nn.Module:
    """Train with each rank on its share of the batches."""
    net = model(dtype)
    optimizer = hvd.DistributedOptimizer(
        make(list(net.parameters())), named_parameters=net.named_parameters(), **options
    )
    for step in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        x, y = batch(step, rows, dtype)
        loss_of(net, x[hvd.rank() :: hvd.size()], y[hvd.rank() :: hvd.size()]).backward()
        optimizer.step()
    return net


def furthest(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """Return the largest difference between the parameters of two models."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def equal_on_all_ranks(net: torch.nn.Module) -> bool:
    """Tell whether all ranks have the same parameters, to the bit, and all are finite."""
    finite = all(bool(p.isfinite().all()) for p in net.parameters())
    values = [p.detach().numpy().tobytes() for p in net.parameters()]
    everyone = hvd.allgather_object(values)
    return finite and all(theirs == values for theirs in everyone)
