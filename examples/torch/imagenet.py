"""A longer run in the style of Horovod's ImageNet script, on handwritten digits.

Warm-up of the learning rate, gradient accumulation, averaged metrics, a checkpoint on rank 0,
and a start from the newest checkpoint. Only the import differs from a Horovod script.

    hpc-dl launch -n 2 examples/torch/imagenet.py --batches-per-allreduce 2
"""

import argparse
import math
import pathlib

import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import hpc_dl.torch as hvd


class Metric:
    """A mean over all batches and all ranks."""

    def __init__(self, name):
        self.name, self.total, self.count = name, torch.tensor(0.0), 0

    def update(self, value):
        """Add this batch's value, averaged over the ranks."""
        self.total += hvd.allreduce(value.detach(), name=self.name)
        self.count += 1

    @property
    def mean(self):
        """The mean so far."""
        return float(self.total / max(self.count, 1))


def network():
    """Return a small convolutional network with batch normalisation."""

    def block(inputs, outputs):
        return [
            torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(outputs),
            torch.nn.ReLU(),
        ]

    return torch.nn.Sequential(
        *block(1, 16),
        *block(16, 32),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 4 * 4, 10),
    )


def rate(epoch, batch, batches, base, scale, warmup_epochs):
    """Rise from ``base`` to ``scale * base`` in the first epochs, then fall along a cosine."""
    progress = epoch + batch / batches
    if progress < warmup_epochs:
        return base * (1 + progress / warmup_epochs * (scale - 1))
    return base * scale * 0.5 * (1 + math.cos(math.pi * min(progress / 10, 1)))


def main():
    """Parse the options and train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint-dir", type=pathlib.Path, default=pathlib.Path("."))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches-per-allreduce", type=int, default=2)
    parser.add_argument("--base-lr", type=float, default=0.02)
    parser.add_argument("--warmup-epochs", type=float, default=1)
    parser.add_argument("--fp16-allreduce", action="store_true")
    args = parser.parse_args()

    hvd.init()
    torch.manual_seed(7)
    torch.set_num_threads(1)
    verbose = hvd.rank() == 0

    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16.0, dtype=torch.float32)
    dataset = TensorDataset(images, torch.tensor(digits.target))
    train_set, val_set = torch.utils.data.random_split(
        dataset, [1437, 360], generator=torch.Generator().manual_seed(1)
    )
    train_sampler = DistributedSampler(train_set, num_replicas=hvd.size(), rank=hvd.rank())
    val_sampler = DistributedSampler(val_set, num_replicas=hvd.size(), rank=hvd.rank())
    total_batch = args.batch_size * args.batches_per_allreduce
    train_loader = DataLoader(train_set, batch_size=total_batch, sampler=train_sampler)
    val_loader = DataLoader(val_set, batch_size=100, sampler=val_sampler)

    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=args.base_lr, momentum=0.9, weight_decay=5e-5),
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
        backward_passes_per_step=args.batches_per_allreduce,
    )

    # Only rank 0 needs to see the checkpoint: the others get what it loads.
    checkpoint = args.checkpoint_dir / "checkpoint.pt"
    first_epoch = 0
    if verbose and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epoch"]
    first_epoch = hvd.broadcast_object(first_epoch, root_rank=0, name="resume_from_epoch")
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    for epoch in range(first_epoch, args.epochs):
        model.train()
        train_sampler.set_epoch(epoch)
        train_loss = Metric("train_loss")
        for batch, (data, target) in enumerate(train_loader):
            scale = args.batches_per_allreduce * hvd.size()
            lr = rate(epoch, batch, len(train_loader), args.base_lr, scale, args.warmup_epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            for start in range(0, len(data), args.batch_size):
                part = slice(start, start + args.batch_size)
                loss = F.cross_entropy(model(data[part]), target[part])
                (loss / math.ceil(len(data) / args.batch_size)).backward()
            optimizer.step()
            train_loss.update(loss)

        model.eval()
        accuracy = Metric("accuracy")
        with torch.no_grad():
            for data, target in val_loader:
                accuracy.update((model(data).argmax(1) == target).float().mean())
        if verbose:
            print(
                f"epoch {epoch + 1} loss {train_loss.mean:.4f} accuracy {accuracy.mean:.4f}",
                flush=True,
            )
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "epoch": epoch + 1,
                },
                checkpoint,
            )


if __name__ == "__main__":
    main()
