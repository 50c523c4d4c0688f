"""Handwritten digits with rules: what is compressed how, and what that saves.

hpc-dl launch -n 2 examples/compression/rules.py             rules by name
hpc-dl launch -n 2 examples/compression/rules.py auto        measure, then choose
hpc-dl launch -n 2 examples/compression/rules.py onebit      one for all; see `hpc-dl compress list`
"""

import sys

import numpy as np
import torch
from sklearn.datasets import load_digits

import hpc_dl.torch as hvd
from hpc_dl.compress import only

BATCH, EPOCHS = 64, 6

#: The first that matches counts; what none matches travels as it is, like all biases here.
RULES = [
    only("0.weight", "powersgd:rank=4", min_bytes=0),
    only("2.weight", "topk:ratio=0.05", min_bytes=0),
    only("4.weight", "none"),
]


def main():
    """Train on this rank's share of each batch, and print accuracy and traffic."""
    hvd.init()
    torch.manual_seed(1)
    torch.set_num_threads(1)

    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    random = np.random.default_rng(0)
    order = random.permutation(len(labels))
    learn, test = order[:-360], order[-360:]

    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 10),
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        model.named_parameters(),
        compression=sys.argv[1] if len(sys.argv) > 1 else RULES,
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    for _ in range(EPOCHS):
        shuffled = random.permutation(learn)
        for begin in range(0, len(learn) - BATCH + 1, BATCH):
            mine = shuffled[begin : begin + BATCH][hvd.rank() :: hvd.size()]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
            optimizer.step()

    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
    traffic = optimizer.traffic()
    if hvd.rank() == 0:
        print(f"test accuracy {accuracy:.4f}")
        print(f"sent {traffic.bytes_sent / 1e6:.2f} MB in {traffic.steps} steps")
        if traffic.bytes_sent:
            print(f"{traffic.bytes_dense / traffic.bytes_sent:.1f} times fewer bytes than without")


if __name__ == "__main__":
    main()
