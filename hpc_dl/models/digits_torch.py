"""A small convolutional network for digits of 8 x 8 pixels, in PyTorch."""

from torch import nn


def digits_cnn(classes: int = 10) -> nn.Module:
    """Build the network: (batch, 1, 8, 8) to (batch, classes) logits; 151,306 parameters for 10.

    No batch normalisation and no dropout: n ranks with batch b then learn exactly what one rank
    with batch n b learns.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )
