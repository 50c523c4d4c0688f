"""Handwritten digits in the style of Horovod's MNIST script.

The only line that differs from a Horovod script is the import. Run it on two ranks:

    hpc-dl launch -n 2 examples/torch/mnist.py
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import hpc_dl.torch as hvd


class Net(torch.nn.Module):
    """Two convolutions and two dense layers for images of 8 x 8."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(16, 32, 3)
        self.drop = torch.nn.Dropout(0.25)
        self.fc1 = torch.nn.Linear(32 * 3 * 3, 64)
        self.fc2 = torch.nn.Linear(64, 10)

    def forward(self, x):
        """Return log probabilities, (N, 10), of images (N, 1, 8, 8)."""
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = self.drop(x.flatten(1))
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


def datasets():
    """Return the digits as a training and a test set."""
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:-360], order[-360:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def train(epoch, model, loader, sampler, optimizer, log_interval):
    """Train one epoch on this rank's share."""
    model.train()
    sampler.set_epoch(epoch)
    for batch, (data, target) in enumerate(loader):
        optimizer.zero_grad()
        loss = F.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
        if hvd.rank() == 0 and batch % log_interval == 0:
            print(
                f"epoch {epoch} batch {batch} of {len(loader)} loss {loss.item():.4f}", flush=True
            )


@torch.no_grad()
def test(model, loader, sampler):
    """Return the accuracy over the test sets of all ranks."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader) / len(sampler)
    return hvd.allreduce(torch.tensor(right), name="accuracy").item()


def main():
    """Parse the options, train, and print the accuracy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--log-interval", type=int, default=10)
    parser.add_argument("--fp16-allreduce", action="store_true")
    parser.add_argument("--use-adasum", action="store_true")
    parser.add_argument("--gradient-predivide-factor", type=float, default=1.0)
    args = parser.parse_args()

    hvd.init()
    torch.manual_seed(42)
    torch.set_num_threads(1)

    train_set, test_set = datasets()
    train_sampler = DistributedSampler(train_set, num_replicas=hvd.size(), rank=hvd.rank())
    test_sampler = DistributedSampler(test_set, num_replicas=hvd.size(), rank=hvd.rank())
    train_loader = DataLoader(train_set, batch_size=args.batch_size, sampler=train_sampler)
    test_loader = DataLoader(test_set, batch_size=200, sampler=test_sampler)

    model = Net()
    # More ranks see more images in a step, so the step may be larger; Adasum scales by itself.
    lr_scale = 1 if args.use_adasum else hvd.size()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr * lr_scale, momentum=args.momentum)

    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
        op=hvd.Adasum if args.use_adasum else hvd.Average,
        gradient_predivide_factor=args.gradient_predivide_factor,
    )

    for epoch in range(1, args.epochs + 1):
        train(epoch, model, train_loader, train_sampler, optimizer, args.log_interval)
        accuracy = test(model, test_loader, test_sampler)
        if hvd.rank() == 0:
            print(f"epoch {epoch} test accuracy {accuracy:.4f}", flush=True)


if __name__ == "__main__":
    main()
