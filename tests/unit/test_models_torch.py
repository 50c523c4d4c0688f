"""The networks are those of the papers."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn  # noqa: E402

from hpc_dl.models.characters_torch import CharacterTransformer  # noqa: E402
from hpc_dl.models.digits_torch import digits_cnn  # noqa: E402
from hpc_dl.models.resnet50_torch import Bottleneck, resnet50  # noqa: E402


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("classes", "expected"), [(1000, 25_557_032), (10, 25_557_032 - 990 * 2049)]
)
def test_resnet50_has_the_published_number_of_parameters(classes: int, expected: int) -> None:
    assert parameters(resnet50(classes)) == expected


@pytest.mark.parametrize("size", [32, 65])
def test_resnet50_maps_images_of_any_size_to_logits(size: int) -> None:
    model = resnet50(7).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_resnet50_shrinks_32_times_before_it_averages() -> None:
    model = resnet50(7).eval()
    assert isinstance(model, nn.Sequential)
    body = model[:-3]
    with torch.no_grad():
        assert body(torch.zeros(1, 3, 224, 224)).shape == (1, 2048, 7, 7)


def test_blocks_begin_as_the_identity() -> None:
    """The last scale is zero, so a fresh block passes on what it gets (Goyal et al., 2017)."""
    block = Bottleneck(16, 4, stride=1, norm=nn.BatchNorm2d)
    x = torch.rand(2, 16, 5, 5)
    torch.testing.assert_close(block(x), x)


def test_the_normalisation_can_be_chosen() -> None:
    model = resnet50(2, norm=lambda channels: nn.GroupNorm(8, channels))
    kinds = {type(module) for module in model.modules()}
    assert nn.GroupNorm in kinds
    assert nn.BatchNorm2d not in kinds
    assert parameters(model) == 25_557_032 - 998 * 2049


def test_the_digits_network_has_the_stated_number_of_parameters() -> None:
    assert parameters(digits_cnn()) == 151_306
    assert digits_cnn()(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_characters_are_predicted_from_those_before() -> None:
    """Another character at one place changes no prediction before it, and those from it on."""
    torch.manual_seed(0)
    model = CharacterTransformer(11, context=16, width=32).eval()
    x = torch.randint(11, (2, 12))
    y = x.clone()
    y[:, 7] = (y[:, 7] + 1) % 11
    with torch.no_grad():
        one, other = model(x), model(y)
    assert one.shape == (2, 12, 11)
    torch.testing.assert_close(one[:, :7], other[:, :7])
    assert ((one[:, 7:] - other[:, 7:]).abs().amax(dim=(0, 2)) > 1e-4).all()


def test_a_text_may_be_shorter_than_the_context_but_not_longer() -> None:
    model = CharacterTransformer(5, context=8, width=16, layers=1)
    assert model(torch.zeros(1, 1, dtype=torch.long)).shape == (1, 1, 5)
    with pytest.raises(IndexError):
        model(torch.zeros(1, 9, dtype=torch.long))
