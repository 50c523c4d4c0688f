"""Train and test a classifier in PyTorch."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import hpc_dl.torch as hvd
from hpc_dl.data import Batch
from hpc_dl.observe import Run, weights_digest
from hpc_dl.training.plan import Outcome, Plan

#: Steps between two losses that the guard of compression is told: to read one from a GPU is to
#: wait for it.
REPORT_EVERY = 10


class Learner(NamedTuple):
    """A network and how it learns."""

    model: nn.Module
    optimizer: Any
    """Wrapped by ``hvd.DistributedOptimizer``."""
    schedule: torch.optim.lr_scheduler.LRScheduler
    """Stepped after each batch."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """(logits, labels) to the mean over the batch."""


def own_device() -> torch.device:
    """Return the device of this rank, and let it use its share of the cores.

    A rank that uses all cores of a node that it shares would slow down the others.
    """
    cores = len(os.sched_getaffinity(0)) // hvd.local_size()
    torch.set_num_threads(max(1, min(cores, torch.get_num_threads())))
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", hvd.local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def fit(learner: Learner, plan: Plan, run: Run) -> Outcome:
    """Train as planned and test after each epoch; all ranks call this.

    Args:
        learner: the network, on its device, equal on all ranks.
        plan: this rank's batches.
        run: where metrics go.
    """
    model, tested = learner.model, dict[str, float]()
    for epoch in range(plan.epochs):
        run.resume()
        trained = _train(learner, plan, epoch, run)
        run.pause()
        tested = _test(learner, plan)
        run.record(
            {
                **trained,
                **{f"test_{name}": value for name, value in tested.items()},
                "lr": learner.schedule.get_last_lr()[0],
            }
        )
    weights = ((name, p.detach().cpu().numpy()) for name, p in model.named_parameters())
    traffic = learner.optimizer.traffic()
    return Outcome(
        tested.get("loss"),
        tested.get("accuracy"),
        traffic.bytes_sent,
        traffic.bytes_dense,
        weights_digest(weights),
    )


def _train(learner: Learner, plan: Plan, epoch: int, run: Run) -> dict[str, float]:
    device = _device(learner.model)
    sums = _no_sums(device)
    learner.model.train()
    for step, batch in enumerate(plan.training_batches(epoch)):
        images, labels = _on(device, batch)
        learner.optimizer.zero_grad()
        logits = learner.model(images)
        loss = learner.loss(logits, labels)
        loss.backward()
        if step % REPORT_EVERY == 0:
            learner.optimizer.report_loss(loss.item())
        learner.optimizer.step()
        learner.schedule.step()
        _add(sums, loss, logits, labels)
        run.step(plan.images_in(step), lambda: _means(sums))
    return _means(hvd.allreduce(sums, op=hvd.Sum, name="training"))


def _test(learner: Learner, plan: Plan) -> dict[str, float]:
    if plan.test is None:
        return {}
    device = _device(learner.model)
    sums = _no_sums(device)
    with _evaluating(learner.model):
        for batch in plan.test_batches():
            images, labels = _on(device, batch)
            logits = learner.model(images)
            _add(sums, learner.loss(logits, labels), logits, labels)
    return _means(hvd.allreduce(sums, op=hvd.Sum, name="test"))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate one model on all ranks: that of rank 0, which is the one to be kept."""
    buffers = dict(model.named_buffers())
    if buffers:
        hvd.broadcast_parameters(buffers, root_rank=0)
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def _add(sums: Tensor, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Add a batch to [sum of the losses, right answers, images], without waiting for a GPU."""
    sums[0] += loss.detach() * len(labels)
    sums[1] += (logits.detach().argmax(1) == labels).sum()
    sums[2] += len(labels)


def _no_sums(device: torch.device) -> Tensor:
    return torch.zeros(3, dtype=torch.float64, device=device)


def _means(sums: Tensor) -> dict[str, float]:
    loss, right, count = sums.tolist()
    return {"loss": loss / count, "accuracy": right / count}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _on(device: torch.device, batch: Batch) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(batch.images).to(device), torch.from_numpy(batch.labels).to(device)
