"""Handwritten digits with 1-bit Adam: after a warm-up, ranks send a 30th of the bytes.

hpc-dl launch -n 2 examples/compression/onebit_adam.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits

import hpc_dl.torch as hvd

BATCH, EPOCHS = 64, 12


def main():
    """Train on this rank's share of each batch, and print the accuracy."""
    hvd.init()
    torch.manual_seed(1)
    torch.set_num_threads(1)

    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    random = np.random.default_rng(0)
    order = random.permutation(len(labels))
    learn, test = order[:-360], order[-360:]
    steps = EPOCHS * (len(learn) // BATCH)

    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    # Gradients travel as they are for a quarter of the steps, then the momentum as signs.
    optimizer = hvd.OneBitAdam(model.parameters(), lr=1e-2, freeze_step=steps // 4)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
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
    sent = optimizer.traffic()
    if hvd.rank() == 0:
        print(f"test accuracy {accuracy:.4f}")
        if sent.bytes_sent:
            print(f"{sent.bytes_dense / sent.bytes_sent:.1f} times fewer bytes than without")


if __name__ == "__main__":
    main()
