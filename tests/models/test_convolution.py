"""The convolution with products for weight gradients, against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_scale.models import convolution
from simclr_scale.models.chunked import encode_in_chunks
from simclr_scale.models.convolution import Convolution


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products are tested whatever processor runs the tests."""
    monkeypatch.setattr(convolution, "_kernels_are_avx2", lambda: True)


def channels_last(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(memory_format=torch.channels_last)


def by_products(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_ConvolutionByProductsBackward"


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "kernel", "stride", "height", "width"),
    [
        (256, 260, 3, 1, 5, 7),
        (260, 256, 3, 2, 9, 6),
        (256, 256, 3, 2, 8, 8),
        (256, 256, 3, 1, 1, 1),
        (33, 70, 1, 1, 7, 5),
        (20, 30, 1, 2, 7, 8),
        (1, 3, 1, 1, 2, 3),
    ],
)
def test_values_and_gradients(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int,
    height: int,
    width: int,
    memory_format: torch.memory_format,
) -> None:
    module = Convolution(in_channels, out_channels, kernel, stride).to(memory_format=torch.channels_last)
    x = channels_last(3, in_channels, height, width).requires_grad_()
    y = module(x)
    assert by_products(y)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(memory_format=memory_format)
    y.backward(dy)

    exact_x, exact_weight = x.detach().double().requires_grad_(), module.weight.detach().double().requires_grad_()
    exact_y = F.conv2d(exact_x, exact_weight, None, stride, kernel // 2)
    exact_y.backward(dy.double())
    assert x.grad is not None
    assert module.weight.grad is not None
    assert exact_x.grad is not None
    assert exact_weight.grad is not None
    assert relative_error(y.detach(), exact_y.detach()) < 2e-6
    assert relative_error(x.grad, exact_x.grad) < 2e-6
    assert relative_error(module.weight.grad, exact_weight.grad) < 2e-6
    # In another layout autograd and the optimizer would copy it.
    assert module.weight.grad.stride() == module.weight.stride()


def test_only_what_is_asked_for() -> None:
    """An image needs no gradient; a frozen weight needs none either, and leaves the products out."""
    module = Convolution(8, 9, 1).to(memory_format=torch.channels_last)
    module(channels_last(2, 8, 3, 3)).square().sum().backward()
    assert module.weight.grad is not None
    module.requires_grad_(False)
    x = channels_last(2, 8, 3, 3).requires_grad_()
    y = module(x)
    assert not by_products(y)
    y.sum().backward()
    assert x.grad is not None


def test_second_derivatives() -> None:
    module = Convolution(6, 5, 1).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(6, 5, 1, bias=False).to(memory_format=torch.channels_last)
    plain.load_state_dict(module.state_dict())
    x = channels_last(2, 6, 4, 3)

    def penalty(layer: nn.Module) -> Tensor:
        images = x.clone(memory_format=torch.channels_last).requires_grad_()
        (slope,) = torch.autograd.grad(layer(images).pow(3).sum(), images, create_graph=True)
        slope.square().sum().backward()
        gradient = layer.weight.grad
        assert isinstance(gradient, Tensor)
        return gradient

    assert by_products(module(x))
    assert relative_error(penalty(module), penalty(plain).double()) < 1e-6


@pytest.mark.parametrize("kind", ["nchw", "float64", "autocast", "no_grad", "few channels", "large map", "kernel"])
def test_elsewhere_it_is_torch_s_own(kind: str) -> None:
    few, large = kind == "few channels", kind == "large map"
    in_channels = 32 if few else 256
    module = Convolution(in_channels, 256, 7 if kind == "kernel" else 3).to(memory_format=torch.channels_last)
    side = 15 if large else 4
    x = channels_last(2, in_channels, side, side)
    if kind == "nchw":
        x = x.contiguous()
    if kind == "float64":
        module, x = module.double(), x.double()
    with torch.autocast("cpu", enabled=kind == "autocast"), torch.set_grad_enabled(kind != "no_grad"):
        assert not by_products(module(x))


def test_another_processor_keeps_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_kernels_are_avx2", lambda: False)
    assert not by_products(Convolution(8, 8, 1)(channels_last(2, 8, 3, 3)))


def test_within_chunks() -> None:
    """Checkpointing runs the forward again: the same gradient as at once."""
    layers = nn.Sequential(Convolution(16, 256, 1), nn.ReLU(), Convolution(256, 256, 3)).to(
        memory_format=torch.channels_last
    )
    x = channels_last(6, 16, 4, 4)
    gradients = []
    for y in (layers(x), encode_in_chunks(layers, x, 4)):
        y.square().sum().backward()
        gradients.append([parameter.grad for parameter in layers.parameters()])
        layers.zero_grad()
    for at_once, in_chunks in zip(*gradients, strict=True):
        torch.testing.assert_close(at_once, in_chunks, rtol=1e-4, atol=1e-4)
