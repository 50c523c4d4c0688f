"""ResNet-50 in PyTorch.

He et al., "Deep residual learning for image recognition", CVPR 2016, with the stride in the
3 x 3 convolution ("v1.5", as in NVIDIA's and torchvision's) and the last scale of each block
starting at zero (Goyal et al., "Accurate, large minibatch SGD", 2017).
"""

from collections.abc import Callable

from torch import Tensor, nn

#: (width of the 3 x 3 convolution, blocks, stride of the first) of each stage.
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
EXPANSION = 4

Norm = Callable[[int], nn.Module]


class Bottleneck(nn.Module):
    """Adds to its input what three convolutions make of it, 1 x 1, 3 x 3 and 1 x 1."""

    def __init__(self, channels: int, width: int, stride: int, norm: Norm):
        super().__init__()
        out = width * EXPANSION
        last = norm(out)
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        self.residual = nn.Sequential(
            _conv(channels, width, 1),
            norm(width),
            nn.ReLU(inplace=True),
            _conv(width, width, 3, stride),
            norm(width),
            nn.ReLU(inplace=True),
            _conv(width, out, 1),
            last,
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(_conv(channels, out, 1, stride), norm(out))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, h, w) to (n, 4 width, h / stride, w / stride)."""
        return self.relu(self.residual(x) + self.shortcut(x))  # type: ignore[no-any-return]


def resnet50(classes: int = 1000, norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """Build the network: (n, 3, h, w) to (n, classes) logits; 25,557,032 parameters for 1000.

    Args:
        classes: the number of logits.
        norm: makes the normalisation of so many channels, for example ``hvd.SyncBatchNorm``.
    """
    blocks: list[nn.Module] = []
    channels = 64
    for width, count, stride in STAGES:
        for i in range(count):
            blocks.append(Bottleneck(channels, width, stride if i == 0 else 1, norm))
            channels = width * EXPANSION
    model = nn.Sequential(
        _conv(3, 64, 7, stride=2),
        norm(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )
    return model.apply(_initialise)


def _conv(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
